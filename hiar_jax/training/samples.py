"""Videos of a run's student: which prompts, how long, made a batch at a time, written as mp4s and a
contact sheet.
"""

from collections.abc import Iterator
import math
import pathlib
import re
import sys

import numpy as np

from hiar_jax import __version__
from hiar_jax.data import pipeline
from hiar_jax.progress import progress
from hiar_jax.training.run import Run
from hiar_jax.types import Params
from hiar_jax.video import lengths
from hiar_jax.video.contact_sheet import contact_sheet
from hiar_jax.video.mp4 import write_mp4
from hiar_jax.video.png import write_png


def read_prompts(run: Run) -> list[str]:
  """`count` held-out prompts of the world, or those of the file."""
  config = run.experiment.sample
  if config.prompts == "held_out":
    if run.experiment.data.source != "shapes":
      return list(dict.fromkeys(pipeline.read_captions(run.directory("data"))))[: config.count]
    return list(dict.fromkeys(run.held_out(config.count)))
  return list(dict.fromkeys(pipeline.read_prompts(config.prompts)))


def measured_prompts(run: Run, prompts: list[str]) -> list[str]:
  """The prompts to show, then held-out ones up to `measure`; empty where there is no truth to
  measure against.
  """
  if run.experiment.data.source != "shapes":
    return []
  return prompts + run.held_out(max(0, run.experiment.sample.measure - len(prompts)))


def long_frames(run: Run) -> int:
  """Frames of `length` training lengths, in whole blocks."""
  e = run.experiment
  return round_to_blocks(run, e.pixel_frames(math.ceil(e.sample.length * e.latent.frames - 1e-9)))


def round_to_blocks(run: Run, frames: int, strict: bool = False) -> int:
  """Frames of the video that will be made: up to whole blocks, saying so.

  Raises UserError where they don't fit and `strict`.
  """
  e = run.experiment
  latent, message = lengths.fit_blocks(frames, e.history.block, e.pixel_frames, strict=strict)
  if message:
    print(message, file=sys.stderr)
  return e.pixel_frames(latent)


def print_remarks(run: Run, prompt: str) -> None:
  """Says which words the model never learnt, and which it does not get to see."""
  for line in run.components.remarks(prompt):
    print(line, file=sys.stderr)


def make_videos(
  run: Run, params: Params, prompts: list[str], frames: int, seed: int, title: str = "sample"
) -> np.ndarray:
  """uint8 [n f H W 3]; video i is made from prompt i and seed + i alone."""
  return np.concatenate(
    list(iterate_videos(run, params, prompts, frames, range(seed, seed + len(prompts)), title))
  )


def iterate_videos(
  run: Run, params: Params, prompts: list[str], frames: int, seeds, title: str
) -> Iterator[np.ndarray]:
  """The same, a batch at a time."""
  batch = min(run.experiment.sample.batch, len(prompts))
  generate = run.sampler(run.experiment.latent_frames(frames))
  tokens = run.tokens(prompts)
  seeds = np.asarray(list(seeds))
  with progress(title, len(prompts)) as bar:
    for start in range(0, len(prompts), batch):
      # the last batch is filled up, so nothing is compiled twice
      rows = np.arange(start, start + batch) % len(prompts)
      latents = generate(params, tokens[rows], seeds[rows])
      count = min(batch, len(prompts) - start)
      yield run.pixels(latents)[:count]
      bar.update(start + count)


def file_name(prompt: str, taken: set[str]) -> str:
  """A short unique name; the whole prompt is in the file's metadata."""
  stem = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "prompt"
  name, i = stem, 2
  while name in taken:
    name, i = f"{stem}-{i}", i + 1
  taken.add(name)
  return f"{name}.mp4"


def save_videos(
  run: Run, directory: pathlib.Path, videos: dict[str, np.ndarray], seed: int
) -> None:
  """An mp4 per prompt and the contact sheet."""
  taken: set[str] = set()
  directory.mkdir(parents=True, exist_ok=True)
  for i, (prompt, frames) in enumerate(videos.items()):
    save_video(run, directory / file_name(prompt, taken), frames, prompt, seed + i)
  sheet = contact_sheet(
    videos,
    columns=12,
    train_frames=run.experiment.data.frames,
    block_frames=run.experiment.history.block,
  )
  write_png(directory / "contact_sheet.png", sheet)
  print(f"{len(videos)} videos and contact_sheet.png in {directory}", file=sys.stderr)


def save_video(run: Run, path: pathlib.Path, frames: np.ndarray, prompt: str, seed: int) -> None:
  """One mp4 that says how it was made."""
  config = run.experiment.sample
  made = {
    "prompt": prompt,
    "seed": str(seed),
    "frames": str(len(frames)),
    "workdir": run.workdir.name,
    "hiar_jax": __version__,
  }
  write_mp4(path, frames, config.fps, made, scale=config.scale)


def shapes_line(result: dict) -> str:
  """The main figures in a line."""
  total = lambda name: result[name]["total"]
  show = lambda value, form: "-" if value is None else format(value, form)
  return (
    f"over {result['settings']['frames']} frames: colour {show(total('colour'), '.1%')}, shape "
    f"{show(total('shape'), '.1%')}, "
    f"direction {show(total('direction'), '.1%')}, motion {show(total('motion'), '.2f')} px "
    f"({show(total('motion_ratio'), '.2f')} of true), error {show(total('error'), '.4f')} "
    f"(last fifth / first {show(result['error_last_over_first'], '.2f')})"
  )
