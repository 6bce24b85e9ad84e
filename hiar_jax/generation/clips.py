"""Videos that are made and written one file each: which there are to make, and making them.

A file that is there already and was made of the same things is not made again, so a list of videos
that was stopped goes on where it was.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import json
import pathlib
import sys

import jax
import numpy as np

from hiar_jax import __version__
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning import Conditioning, latent_frames
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.progress import progress
from hiar_jax.training import samples
from hiar_jax.video.mp4 import read_metadata, write_mp4


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video to make: `frames` new latent frames after `given` ones."""

  job: Job
  path: pathlib.Path
  start: Conditioning | None
  given: int
  frames: int

  def provenance(self, model: VideoModel) -> dict[str, str]:
    """What the file says of itself. `recipe` is the same for the same video alone."""
    e = model.experiment
    told = {
      "prompt": self.job.prompt,
      "seed": str(self.job.seed),
      "frames": str(e.pixel_frames(self.given + self.frames)),
      "size": f"{e.data.height}x{e.data.width}",
      "dtype": e.model.dtype,
      "codec": model.codec,
      "start": f"{self.start.kind} {self.start.path.name}" if self.start else "",
    }
    content = [
      told,
      model.identity,
      self.start.digest if self.start else "",
      e.sample.fps,
      e.sample.scale,
    ]
    recipe = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {
      **told,
      "weights" if model.weights else "workdir": model.name,
      "recipe": recipe,
      "hiar_jax": __version__,
    }

  def is_done(self, model: VideoModel) -> bool:
    """Whether the file is there and was made of the same things; says so."""
    done = (
      self.path.exists()
      and (read_metadata(self.path) or {}).get("recipe") == self.provenance(model)["recipe"]
    )
    if done:
      print(
        f"{self.path} is there already, made of the same prompt, seed and weights; --overwrite "
        "makes it again",
        file=sys.stderr,
      )
    return done


def output_paths(jobs: list[Job], out: str | None, many: bool) -> list[pathlib.Path]:
  """A file per job: as it is named, else after its prompt.

  out: the file, or of `many` the directory.
  """
  taken = {job.out.removesuffix(".mp4") for job in jobs if job.out}
  if many:
    if out and pathlib.Path(out).is_file():
      raise UserError(f"--out={out} is a file; with --prompts it names the directory of the videos")
    names = [job.out or samples.file_name(job.prompt, taken) for job in jobs]
    return [pathlib.Path(out or "videos") / name for name in names]
  path = pathlib.Path(out or samples.file_name(jobs[0].prompt, taken))
  if path.suffix != ".mp4":
    raise UserError(f"--out={path}: expected a name that ends in .mp4")
  return [path]


def plan_clips(
  model: VideoModel, jobs: list[Job], paths: list[pathlib.Path], fit: Callable[[int], int]
) -> list[Clip]:
  """Reads every start once, so that what is wrong with one is said before hours of work; says once
  what was done to each.

  fit: given latent frames -> new latent frames after them.
  """
  e, clips, said = model.experiment, [], set()
  fitted: dict[int, int] = {}
  for job, path in zip(jobs, paths, strict=True):
    start, given = Conditioning.of(job), 0
    if start:
      pixels, line = start.read(e)
      given = latent_frames(pixels, e)
      if line and line not in said:
        print(line, file=sys.stderr)
      said.add(line)
    if given not in fitted:
      fitted[given] = fit(given)
    clips.append(Clip(job, path, start, given, fitted[given]))
  return clips


def write_clips(model: VideoModel, clips: list[Clip]) -> None:
  """Makes the videos, those that start alike in batches, and prints the path of each when it is
  whole.
  """
  model.prepare_texts(list(dict.fromkeys(clip.job.prompt for clip in clips)))
  params = model.params()
  alike: dict[tuple[int, int], list[Clip]] = {}
  for clip in clips:
    alike.setdefault((clip.given, clip.frames), []).append(clip)
  with progress("generate", len(clips)) as bar:
    done = 0
    for (given, frames), group in alike.items():
      for batch, latents in iterate_latents(model, params, group, frames, given):
        for i, clip in enumerate(batch):
          write_clip(model, clip, np.asarray(latents[i : i + 1]))
          bar.update(done := done + 1)


def iterate_latents(
  model: VideoModel, params, clips: list[Clip], frames: int, given: int
) -> Iterator[tuple[list[Clip], jax.Array]]:
  """(clips, their latents [b f h w c]) a batch at a time; a video does not depend on those beside
  it.
  """
  size = min(model.experiment.sample.batch, len(clips))
  generate = model.generator(frames)
  for first in range(0, len(clips), size):
    batch = clips[first : first + size]
    # the last batch is filled up, so nothing is compiled twice
    rows = [batch[i % len(batch)] for i in range(size)]
    start = [np.concatenate([start_latents(model, clip) for clip in rows])] if given else []
    texts = model.texts([clip.job.prompt for clip in rows])
    yield batch, generate(params, texts, np.asarray([clip.job.seed for clip in rows]), *start)


def start_latents(model: VideoModel, clip: Clip) -> np.ndarray:
  """[1 given h w c]"""
  pixels, _ = clip.start.read(model.experiment)
  return np.asarray(model.run.components.latents(pixels[None]))


def write_clip(model: VideoModel, clip: Clip, latents: np.ndarray) -> None:
  """Decodes piece by piece into a file that says how it was made."""
  config = model.experiment.sample
  pieces = (piece[0] for piece in model.run.components.pieces(latents))
  write_mp4(clip.path, pieces, config.fps, clip.provenance(model), scale=config.scale)
  print(clip.path, file=sys.stdout, flush=True)
