"""Videos of a run's student: their prompts and length, sampling in batches, and the files (mp4s and
a contact sheet).
"""

from collections.abc import Sequence
import pathlib
import re
import sys

import numpy as np

from hiar_jax import __version__
from hiar_jax.data import pipeline, prompt_rows, shapes_described, tfds_builder
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import everywhere
from hiar_jax.progress import Progress
from hiar_jax.training.run import Run
from hiar_jax.types import Params
from hiar_jax.video import lengths
from hiar_jax.video.contact_sheet import contact_sheet
from hiar_jax.video.mp4 import write_mp4
from hiar_jax.video.png import write_png


def read_prompts(run: Run) -> list[str]:
  """Returns the distinct prompts of the file, or up to `count` as Run.preview_prompts."""
  config = run.experiment.sample
  if config.prompts == "held_out":
    return list(dict.fromkeys(run.preview_prompts(config.count)))
  return list(dict.fromkeys(prompt_rows.read_prompts(config.prompts, say=True)))


def measured_prompts(run: Run, prompts: list[str]) -> list[str]:
  """Returns `prompts`, then held-out ones up to `measure`; none where there is no truth to measure
  against.
  """
  if run.source.world is None:
    return []
  return prompts + run.held_out(max(0, run.experiment.sample.measure - len(prompts)))


def long_frames(run: Run) -> int:
  """Returns the frames of a video of `length` training lengths in whole blocks, and given ones."""
  e = run.experiment
  return round_to_blocks(run, e.codec.pixel_frames(e.given + e.sample_frames))


def round_to_blocks(run: Run, frames: int, strict: bool = False) -> int:
  """Returns `frames` rounded up to whole blocks after those that the model is given; prints a note
  where that changes them.

  Raises UserError instead where `strict`.
  """
  e = run.experiment
  latent, message = lengths.fit_blocks(
    frames, e.history.block, e.codec.pixel_frames, given=e.given, strict=strict
  )
  if message:
    print(message, file=sys.stderr)
  return e.codec.pixel_frames(e.given + latent)


def given_pixels(run: Run) -> int:
  """Returns the frames of a video's start that the model is given (framepack.given)."""
  e = run.experiment
  return e.codec.pixel_frames(e.given) if e.given else 0  # Wan's codec has no 0 frames


def true_starts(run: Run, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, ...]:
  """Returns the latents [n given h w c] of true frames that videos of prompts start from; nothing
  for a model that is given none.

  In the shapes world they are rendered, each seed its own; else the clip with the prompt for its
  caption begins with them. Raises UserError where no clip has it.
  """
  frames = given_pixels(run)
  if not frames:
    return ()
  if run.source.world is not None:
    pairs = zip(prompts, seeds, strict=True)
    starts = [shapes_described.true_video(*pair, run.world, frames) for pair in pairs]
  else:
    directory = run.directory("data")
    captions, clips = pipeline.read_captions(directory), tfds_builder.open_source(directory)
    for prompt in prompts:
      if prompt not in captions:
        raise UserError(f"{prompt!r} is no caption of the data, whose clips the videos start from")
    found = [clips[captions.index(prompt)] for prompt in prompts]
    if run.experiment.stores_latents:
      # causal: the first latent frames are those of the first frames alone
      starts = [clip["latents"][: run.experiment.given] for clip in found]
      return (np.stack(starts).astype(np.float32),)
    starts = [clip["video"][:frames] for clip in found]
  return (np.asarray(run.autoencoder.latents(np.stack(starts))),)


def print_warnings(run: Run, prompt: str) -> None:
  """Prints which words of a prompt the model has not learnt, and which are beyond its length."""
  for warning in run.text_encoder.warnings(prompt):
    print(warning, file=sys.stderr)


def make_videos(
  run: Run, params: Params, prompts: list[str], frames: int, seed: int, title: str = "sample"
) -> np.ndarray:
  """Makes videos uint8 [n F H W 3], `sample.batch` at a time.

  Video i depends on prompt i and on seed + i alone. F = `frames` counts those that it is given.
  """
  e = run.experiment
  batch = min(e.sample.batch, len(prompts))
  generate = run.sampler(e.codec.latent_frames(frames) - e.given)
  seeds = np.arange(seed, seed + len(prompts))
  videos = []
  with Progress(title, len(prompts)) as bar:
    for start in range(0, len(prompts), batch):
      # the last batch is filled up with the first prompts again, so that nothing is compiled twice
      rows = np.arange(start, start + batch) % len(prompts)
      chosen = [prompts[i] for i in rows]
      given = true_starts(run, chosen, seeds[rows])
      latents = everywhere(generate(params, run.texts(chosen), seeds[rows], *given), run.mesh)
      check_finite(latents, title)
      count = min(batch, len(prompts) - start)
      videos.append(run.pixels(latents)[:count])
      bar.update(start + count)
  return np.concatenate(videos)


def check_finite(latents, name: str) -> None:
  """Raises UserError, with a name, for latents that are not finite: they would be a black video."""
  if not np.isfinite(np.asarray(latents)).all():
    raise UserError(
      f"{name}: the model has made numbers that are not finite; its weights or a text hold such: "
      "train or convert them anew; or they overflow: compute in float32 (--dtype=float32)"
    )


def without_given(
  run: Run, params: Params, prompts: list[str], frames: int, seed: int, title: str
) -> np.ndarray:
  """Makes videos as make_videos and returns the `frames` that follow those that the model is given,
  uint8 [n frames H W 3].
  """
  given = given_pixels(run)
  return make_videos(run, params, prompts, given + frames, seed, title)[:, given:]


def file_name(prompt: str, taken: set[str]) -> str:
  """Returns a short name that is not in `taken`, and adds it there.

  The whole prompt is in the file's metadata.
  """
  # no dots or slashes: a prompt cannot name another directory
  stem = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "prompt"
  name, i = stem, 2
  while name in taken:
    name, i = f"{stem}-{i}", i + 1
  taken.add(name)
  return f"{name}.mp4"


def save_videos(
  run: Run, directory: pathlib.Path, videos: dict[str, np.ndarray], seed: int
) -> None:
  """Writes an mp4 for each prompt, with its origin in the metadata, and contact_sheet.png.

  videos: prompt -> uint8 [F H W 3].
  """
  config = run.experiment.sample
  taken: set[str] = set()
  directory.mkdir(parents=True, exist_ok=True)
  for i, (prompt, frames) in enumerate(videos.items()):
    metadata = {
      "prompt": prompt,
      "seed": str(seed + i),
      "frames": str(len(frames)),
      "workdir": run.workdir.name,
      "stage": run.experiment.last_stage,
      "step": str(getattr(run.experiment, run.experiment.last_stage).steps),
      "hiar_jax": __version__,
    }
    path = directory / file_name(prompt, taken)
    write_mp4(path, frames, config.fps, metadata, scale=config.scale)
  sheet = contact_sheet(
    videos,
    columns=12,
    train_frames=run.experiment.data.frames,
    block_frames=run.experiment.history.block,
  )
  write_png(directory / "contact_sheet.png", sheet)
  print(f"{len(videos)} videos and contact_sheet.png in {directory}", file=sys.stderr)


def shapes_line(result: dict) -> str:
  """Returns the main figures of shapes_truth.measure in one line, `-` for those without a value."""

  def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

  forms = {"motion": ".2f", "motion_ratio": ".2f", "error": ".4f"}
  forms |= dict.fromkeys(("colour", "shape", "direction"), ".1%")
  total = {name: number(result[name]["total"], form) for name, form in forms.items()}
  passage = ""
  if "passage" in result:  # of a world with a screen
    forms = {"returned": ".1%", "agree": ".1%", "chance": ".1%", "unseen": ".1f"}
    of = {name: number(result["passage"][name], form) for name, form in forms.items()}
    passage = (
      f"; came back {of['returned']}, same colour {of['agree']} (by chance {of['chance']}), "
      f"after {of['unseen']} frames unseen"
    )
  return (
    f"over {result['settings']['frames']} frames: colour {total['colour']}, "
    f"shape {total['shape']}, direction {total['direction']}, "
    f"motion {total['motion']} px ({total['motion_ratio']} of true), error {total['error']} "
    f"(last fifth / first {number(result['error_last_over_first'], '.2f')}){passage}"
  )
