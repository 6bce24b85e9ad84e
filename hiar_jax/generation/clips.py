"""Generates videos in batches and writes one mp4 file each.

A file that exists with the same recipe (prompt, seed, weights, sizes, ...) is kept, so the same
command resumes a stopped list of videos.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import numbers
import pathlib
import sys

import jax
import numpy as np

from hiar_jax import __version__
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning_frames import Conditioning, latent_frames
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.progress import Progress
from hiar_jax.training import samples
from hiar_jax.video import lengths
from hiar_jax.video.mp4 import read_metadata, write_mp4


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video to generate: `frames` new latent frames after `given` conditioning frames.

  path: of its file; None where the frames are returned instead.
  """

  job: Job
  path: pathlib.Path | None
  start: Conditioning | None
  given: int
  frames: int

  def provenance(self, model: VideoModel) -> dict[str, str]:
    """The metadata written into the file; equal `recipe` means an equal video."""
    e = model.experiment
    metadata = {
      "prompt": self.job.prompt,
      "seed": str(self.job.seed),
      "frames": str(e.codec.pixel_frames(self.given + self.frames)),
      "size": f"{e.data.height}x{e.data.width}",
      "dtype": e.model.dtype,
      "codec": e.codec.label,
      "start": f"{self.start.kind} {self.start.path.name}" if self.start else "",
    }
    # the recipe: also what changes the file but has no key of its own in the metadata
    content = [
      metadata,
      model.identity,
      self.start.digest if self.start else "",
      e.sample.fps,
      e.sample.scale,
    ]
    recipe = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {
      **metadata,
      "weights" if model.weights else "workdir": model.name,
      "recipe": recipe,
      "hiar_jax": __version__,
    }

  def is_done(self, model: VideoModel) -> bool:
    """True, with a message on stderr, where the file exists and has this clip's recipe."""
    if not self.path.exists():
      return False
    # {} for a file without metadata, None for one that is no video: both are written over
    metadata = read_metadata(self.path) or {}
    if metadata.get("recipe") != self.provenance(model)["recipe"]:
      return False
    print(
      f"{self.path} is there already, made of the same prompt, seed and weights; --overwrite makes "
      "it again",
      file=sys.stderr,
    )
    return True


def output_paths(jobs: list[Job], out: str | None, many: bool) -> list[pathlib.Path]:
  """Returns one path per job: the job's own name, else one made of its prompt.

  out: the file; if `many`, the directory. Raises UserError where it cannot be that.
  """
  # first all names that jobs ask for, so that no name made of a prompt takes one of them
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
  model: VideoModel,
  jobs: list[Job],
  paths: Sequence[pathlib.Path | None],
  frames: int | None,
  *,
  strict: bool = False,
) -> list[Clip]:
  """Returns the clips, with the lengths of their conditioning frames and of what follows.

  frames, strict: as new_frames.

  Raises UserError for a conditioning file that cannot be used, and as new_frames.
  """
  e = model.experiment
  clips = []
  messages = set()
  fitted: dict[int, int] = {}  # new_frames prints a message: called once for each length
  for job, path in zip(jobs, paths, strict=True):
    start, given = Conditioning.from_job(job), 0
    if start:
      # All files are read here, before hours of work, and again when their batch is generated:
      # the pixels of a long list need not fit into memory.
      pixels, message = start.read(e)
      given = latent_frames(pixels, e)
      if message and message not in messages:
        print(message, file=sys.stderr)
      messages.add(message)
    if given not in fitted:
      fitted[given] = new_frames(model, frames, given, strict=strict)
    clips.append(Clip(job, path, start, given, fitted[given]))
  return clips


def new_frames(model: VideoModel, frames: int | None, given: int, *, strict: bool = False) -> int:
  """Returns the new latent frames, in whole blocks, after `given` ones; prints a rounded count.

  frames: pixel frames of the whole video, conditioning frames included; None: the default length.

  Raises UserError for no whole number, and as lengths.fit_blocks.
  """
  e = model.experiment
  if frames is None:
    # a default length counts new frames alone: of a run four training lengths, else one
    return e.codec.latent_frames(samples.long_frames(model.run) if model.stage else e.data.frames)
  if not isinstance(frames, numbers.Integral):
    raise UserError(f"frames = {frames!r}: expected a whole number")
  latent, message = lengths.fit_blocks(
    int(frames), e.history.block, e.codec.pixel_frames, given=given, strict=strict
  )
  if message:
    print(message, file=sys.stderr)
  return latent


def write_clips(model: VideoModel, clips: list[Clip]) -> None:
  """Generates the videos and prints the path of each one when its file is complete."""
  made = make_clips(model, clips)
  with Progress("generate", len(clips)) as bar:
    for done, (clip, latents) in enumerate(made, 1):
      write_clip(model, clip, latents)
      bar.update(done)


def make_clips(model: VideoModel, clips: list[Clip]) -> Iterator[tuple[Clip, np.ndarray]]:
  """Loads the weights, and returns an iterator of each clip with its latents [1 f h w c].

  Clips with equal numbers of conditioning and new frames come together.
  """
  # texts first: the text encoder has left the memory before the network's weights are loaded
  model.prepare_texts(list(dict.fromkeys(clip.job.prompt for clip in clips)))
  params = model.params()
  # a batch has one shape
  alike: dict[tuple[int, int], list[Clip]] = {}
  for clip in clips:
    alike.setdefault((clip.given, clip.frames), []).append(clip)
  return (
    (clip, np.asarray(latents[i : i + 1]))
    for (given, frames), group in alike.items()
    for batch, latents in iterate_latents(model, params, group, frames, given)
    for i, clip in enumerate(batch)
  )


def iterate_latents(
  model: VideoModel, params, clips: list[Clip], frames: int, given: int
) -> Iterator[tuple[list[Clip], jax.Array]]:
  """Yields (clips, their latents [b f h w c]), a batch at a time.

  A video depends on its own prompt, seed and conditioning alone. In a filled-up last batch b is
  larger than the number of clips.
  """
  size = min(model.experiment.sample.batch, len(clips))
  generate = model.sampler(frames)
  for first in range(0, len(clips), size):
    batch = clips[first : first + size]
    # the last batch repeats its clips up to the size, so that the sampler is compiled once
    rows = [batch[i % len(batch)] for i in range(size)]
    start = [np.concatenate([start_latents(model, clip) for clip in rows])] if given else []
    texts = model.run.texts([clip.job.prompt for clip in rows])
    seeds = np.asarray([clip.job.seed for clip in rows])
    yield batch, generate(params, texts, seeds, *start)


def start_latents(model: VideoModel, clip: Clip) -> np.ndarray:
  """Encodes the conditioning frames of a clip into latents [1 given h w c]."""
  pixels, _ = clip.start.read(model.experiment)
  return np.asarray(model.run.autoencoder.latents(pixels[None]))


def decoded(model: VideoModel, latents: np.ndarray) -> Iterator[np.ndarray]:
  """Decodes the latents [1 f h w c] of one video into pieces uint8 [F_i H W 3]."""
  return (piece[0] for piece in model.run.autoencoder.pieces(latents))


def write_clip(model: VideoModel, clip: Clip, latents: np.ndarray) -> None:
  """Decodes latents [1 f h w c] piece by piece into the clip's file, its metadata included."""
  config = model.experiment.sample
  pieces = decoded(model, latents)
  write_mp4(clip.path, pieces, config.fps, clip.provenance(model), scale=config.scale)
  print(clip.path, flush=True)  # stdout holds the paths alone; messages go to stderr
