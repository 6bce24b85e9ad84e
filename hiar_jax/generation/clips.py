"""Generates videos in batches and writes one mp4 file each.

A file that exists with the same recipe (prompt, seed, weights, sizes, ...) is kept, so the same
command resumes a stopped list of videos.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import json
import numbers
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np

from hiar_jax import __version__
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.sections import check_sections, check_told, prompts_of, seeds_of
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.progress import Progress
from hiar_jax.training import samples
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import lengths
from hiar_jax.video.mp4 import read_metadata, write_mp4


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video to generate: `frames` new latent frames after `given` conditioning frames and before
  `behind` others.

  path: of its file; None where the frames are returned instead.
  """

  job: Job
  path: pathlib.Path | None
  start: Conditioning | None
  given: int
  frames: int
  end: Conditioning | None = None
  behind: int = 0

  @property
  def sections(self) -> dict:
    """The arguments of VideoModel.sampler beside the number of frames."""
    told = {"order": self.job.order, "loop": self.job.loop, "ended": bool(self.behind)}
    return {name: value for name, value in told.items() if value}

  @property
  def shape(self) -> tuple:
    """Equal for clips that one program can make at once."""
    told = bool(self.job.timeline), bool(self.job.takes)
    return (self.given, self.frames, self.behind, *told, *self.sections.items())

  def prompts(self, model: VideoModel) -> list[str]:
    """Its prompt, or with a timeline that of each section. Raises UserError as prompts_of."""
    job, e = self.job, model.experiment
    if not job.timeline:
      return [job.prompt]
    firsts = range(self.given, self.given + self.frames, e.history.block)
    starts = [(e.codec.pixel_frames(n) if n else 0) / e.sample.fps for n in firsts]
    return prompts_of(job.prompt, job.timeline, starts)

  def seeds(self, model: VideoModel) -> list[int]:
    """Its seed, or with takes that of each section. Raises UserError as seeds_of."""
    job = self.job
    if not job.takes:
      return [job.seed]
    return seeds_of(job.seed, job.takes, self.frames // model.experiment.history.block)

  def pixel_frames(self, e: Experiment) -> int:
    """The frames of the whole video."""
    behind = e.codec.pixel_frames(self.behind) if self.behind else 0
    return e.codec.pixel_frames(self.given + self.frames) + behind

  def provenance(self, model: VideoModel) -> dict[str, str]:
    """The metadata written into the file; equal `recipe` means an equal video."""
    e = model.experiment
    metadata = {
      "prompt": self.job.prompt,
      "seed": str(self.job.seed),
      "frames": str(self.pixel_frames(e)),
      "size": f"{e.data.height}x{e.data.width}",
      "dtype": e.model.dtype,
      "codec": e.codec.label,
      "start": f"{self.start.kind} {self.start.path.name}" if self.start else "",
      **self._told(),
    }
    # the recipe: also what changes the file but has no key of its own in the metadata
    content = [
      metadata,
      model.identity,
      self.start.digest if self.start else "",
      e.sample.fps,
      e.sample.scale,
      # only of those that have one, so that other videos keep their recipes
      *([self.end.digest] if self.end else []),
    ]
    recipe = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {
      **metadata,
      **model.origin,
      "recipe": recipe,
      "hiar_jax": __version__,
    }

  def _told(self) -> dict[str, str]:
    """The metadata of what only packed models do, nothing for what is not in use."""
    job = self.job
    found = {
      "end": f"{self.end.kind} {self.end.path.name}" if self.end else "",
      "loop": "yes" if job.loop else "",
      "order": job.order,
      "timeline": job.timeline.text() if job.timeline else "",
      "takes": ", ".join(f"{section}:{seed}" for section, seed in job.takes),
    }
    return {name: text for name, text in found.items() if text}

  def is_done(self, model: VideoModel) -> bool:
    """True where the file exists and has this clip's recipe. Says on stderr that it does, or what
    it holds else, which is replaced.

    Raises UserError where it holds a video that was not generated here.
    """
    if not self.path.exists():
      return False
    found, wanted = read_metadata(self.path), self.provenance(model)
    if found is not None and "recipe" not in found:
      raise UserError(
        f"{self.path} is there, a video that was not generated here; give another --out, or "
        "--overwrite"
      )
    if found is None:
      print(f"{self.path} is there and is no whole video: it is made again", file=sys.stderr)
    elif found["recipe"] != wanted["recipe"]:
      differing = [name for name in wanted if found.get(name) != wanted[name] and name != "recipe"]
      what = ", ".join(f"{name} {found.get(name)}, here {wanted[name]}" for name in differing)
      print(
        f"{self.path} is there, another video ({what or 'of other weights or settings'}): it is "
        "replaced",
        file=sys.stderr,
      )
    else:
      print(
        f"{self.path} is there already, made of the same prompt, seed and weights; --overwrite "
        "makes it again",
        file=sys.stderr,
      )
      return True
    return False


def output_paths(jobs: list[Job], out: str | None, many: bool) -> list[pathlib.Path]:
  """Returns one path per job: the job's own name, else one made of its prompt.

  out: the file; if `many`, the directory. Raises UserError where it cannot be that.
  """
  # first all names that jobs ask for, so that no name made of a prompt takes one of them
  taken = {job.out.removesuffix(".mp4") for job in jobs if job.out}
  if many:
    if out and pathlib.Path(out).is_file():
      raise UserError(f"--out={out} is a file; with --prompts it names the directory of the videos")
    names = [job.out or samples.file_name(job.title, taken) for job in jobs]
    paths = [pathlib.Path(out or "videos") / name for name in names]
    first: dict[str, pathlib.Path] = {}
    for path in paths:  # two names are one file where one's folder is a link to the other's
      other = first.setdefault(os.path.realpath(path), path)
      if other is not path:
        raise UserError(f"{other} and {path} are one file; give each video a name of its own")
    return paths
  path = pathlib.Path(out or samples.file_name(jobs[0].title, taken))
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

  Raises UserError for a conditioning file that cannot be used, what the model cannot do, and as
  new_frames.
  """
  e = model.experiment
  clips = []
  messages = {""}
  fitted: dict[tuple, int] = {}  # new_frames prints a message: called once for each length
  for job, path in zip(jobs, paths, strict=True):
    check_told(e, job.told)
    start = Conditioning.of(job.image, job.video)
    end = Conditioning.of(job.end_image, job.end_video, is_end=True)
    counts = []
    for conditioning in (start, end):
      # All files are read here, before hours of work, and again when their batch is generated:
      # the pixels of a long list need not fit into memory.
      pixels, message = conditioning.read(e) if conditioning else ([], "")
      counts.append(e.codec.latent_frames(len(pixels)) if conditioning else 0)
      if message not in messages:
        print(message, file=sys.stderr)
      messages.add(message)
    given, behind = counts
    if (given, behind) not in fitted:
      fitted[given, behind] = new_frames(model, frames, given, behind, strict=strict)
    clip = Clip(job, path, start, given, fitted[given, behind], end, behind)
    if e.framepack:
      ends = dict(given=given, behind=behind, loop=job.loop)
      check_sections(e, job.order or e.sample.order, clip.frames, **ends)
    clip.prompts(model), clip.seeds(model)  # raise for what does not fit the sections
    clips.append(clip)
  return clips


def new_frames(
  model: VideoModel, frames: int | None, given: int, behind: int = 0, *, strict: bool = False
) -> int:
  """Returns the new latent frames, in whole blocks, after `given` ones and before `behind` others;
  prints a rounded count.

  frames: pixel frames of the whole video, conditioning frames included; None: the default length.

  Raises UserError for no whole number, and as lengths.fit_blocks.
  """
  e = model.experiment
  if frames is None:
    # a default length counts new frames alone: of a run four training lengths, else one
    whole = samples.long_frames(model.run) if model.stage else e.data.frames
    return e.codec.latent_frames(whole) - e.given
  if not isinstance(frames, numbers.Integral) or isinstance(frames, bool):
    raise UserError(f"frames = {frames!r}: expected a whole number")
  latent, message = lengths.fit_blocks(
    int(frames),
    e.history.block,
    e.codec.pixel_frames,
    given=given,
    behind=e.codec.pixel_frames(behind) if behind else 0,
    strict=strict,
  )
  if message:
    print(message, file=sys.stderr)
  return latent


class Made(NamedTuple):
  """The latents [1 f h w c] of a clip, and which of their frames are made, bool [f]; the others are
  NaN.
  """

  clip: Clip
  latents: np.ndarray
  frames: np.ndarray


def write_clips(
  model: VideoModel, clips: list[Clip], watch: Callable[[Made], None] | None = None
) -> None:
  """Generates the videos and prints the path of each one when its file is complete.

  watch: called with the clips of a packed model after each step of their order, the last one
  after its file.
  """
  config, done = model.experiment.sample, 0
  with Progress("generate", len(clips)) as bar:
    for made in make_clips(model, clips, watched=watch is not None):
      if made.frames.all():
        pieces = shown(model, made.clip, made.latents)  # decoded while they are written
        path, metadata = made.clip.path, made.clip.provenance(model)
        write_mp4(path, pieces, config.fps, metadata, scale=config.scale)
        print(path, flush=True)  # stdout holds the paths alone; messages go to stderr
        done += 1
        bar.update(done)
      if watch:
        watch(made)


def make_clips(model: VideoModel, clips: list[Clip], *, watched: bool = False) -> Iterator[Made]:
  """Loads the weights, and returns an iterator of each clip, whole; watched: of each clip of a
  packed model after each step of its order, whole at last.

  Clips with equal numbers of conditioning and new frames come together.
  """
  # texts first: the text encoder has left the memory before the network's weights are loaded
  model.prepare_texts(list(dict.fromkeys(p for clip in clips for p in clip.prompts(model))))
  params = model.params()
  return (
    Made(clip, np.asarray(latents[i : i + 1]), made)
    for group in alike(clips)
    for batch, latents, made in iterate_latents(model, params, group, watched)
    for i, clip in enumerate(batch)
  )


def alike(clips: list[Clip]) -> list[list[Clip]]:
  """Returns the clips in groups of one shape, as a batch has it."""
  found: dict[tuple, list[Clip]] = {}
  for clip in clips:
    found.setdefault(clip.shape, []).append(clip)
  return list(found.values())


def iterate_latents(
  model: VideoModel, params, clips: list[Clip], watched: bool = False
) -> Iterator[tuple[list[Clip], jax.Array, np.ndarray]]:
  """Yields (clips, their latents [b f h w c], which frames are made [f]), a batch at a time, or
  watched after each of its steps; clips of one shape.

  A video depends on its own prompt, seed and conditioning alone. In a filled-up last batch b is
  larger than the number of clips.
  """
  size = min(model.experiment.sample.batch, len(clips))
  said = {**clips[0].sections, **({"watched": True} if watched else {})}
  generate = model.sampler(clips[0].frames, **said)
  for first in range(0, len(clips), size):
    batch = clips[first : first + size]
    # the last batch repeats its clips up to the size, so that the sampler is compiled once
    rows = [batch[i % len(batch)] for i in range(size)]
    given = [latents_of(model, clip.start) for clip in rows if clip.start]
    behind = [latents_of(model, clip.end) for clip in rows if clip.end]
    ends = [np.concatenate(part) if part else None for part in (given, behind)]
    while ends and ends[-1] is None:
      ends.pop()  # the sampler of a causal model takes no end
    prompts = [clip.prompts(model) for clip in rows]
    texts = model.run.texts([prompt for each in prompts for prompt in each])
    seeds = np.asarray([clip.seeds(model) for clip in rows])
    # a text and a seed for each section, where a clip has them
    if rows[0].job.timeline:
      texts = texts.reshape(len(rows), -1, *texts.shape[1:])
    made = generate(params, texts, seeds if rows[0].job.takes else seeds[:, 0], *ends)
    for latents, frames in made if watched else [(made, np.ones(made.shape[1], bool))]:
      samples.check_finite(np.asarray(latents)[: len(batch), frames], batch[0].job.title)
      yield batch, latents, frames


def latents_of(model: VideoModel, conditioning: Conditioning) -> np.ndarray:
  """Encodes conditioning frames into latents [1 f h w c]."""
  pixels, _ = conditioning.read(model.experiment)
  return np.asarray(model.run.autoencoder.latents(pixels[None]))


def shown(model: VideoModel, clip: Clip, latents: np.ndarray) -> Iterator[np.ndarray]:
  """Returns the frames of a clip's latents [1 f h w c], in pieces uint8 [F_i H W 3]; a file that it
  ends with is kept as it is.
  """
  yield from decoded(model, latents[:, : clip.given + clip.frames])
  if clip.end:
    yield clip.end.read(model.experiment)[0]


def decoded(model: VideoModel, latents: np.ndarray) -> Iterator[np.ndarray]:
  """Decodes the latents [1 f h w c] of one video into pieces uint8 [F_i H W 3]."""
  return (piece[0] for piece in model.run.autoencoder.pieces(latents))
