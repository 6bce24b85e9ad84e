"""Makes videos: from a trained run, or from a config and converted weights.

    python -m hiar_jax.generate --workdir=runs/shapes --prompt="a red circle" --out=clip.mp4
    python -m hiar_jax.generate --config=experiments/hiar_wan_1_3b.py --weights=weights/hiar \
      --prompt="A cat walks on grass" --out=clip.mp4

The same prompt and seed give the same video, alone or among others (`--prompts=FILE`, see
prompts_file.py). `--image` and `--video` say what it starts from, kept as it is. A file that is
there already and was made of the same things is not made again. `--plan` says what it would cost,
and loads nothing.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
import pathlib
import sys

from absl import flags
import jax
from ml_collections import config_dict, config_flags
import numpy as np

from hiar_jax import __version__, peak_memory
from hiar_jax.config import command_line as configs
from hiar_jax.errors import UserError
from hiar_jax.generation import prompts_file, video_model
from hiar_jax.generation.conditioning import Start, latent_frames
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.video_model import Changes, StudentModel
from hiar_jax.planning.costs import DTYPES
from hiar_jax.progress import progress
from hiar_jax.training import samples
from hiar_jax.video import lengths
from hiar_jax.video.mp4 import read_metadata, write_mp4

STAGES = ("distill", "causal_init")


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command by their names; `--help` says what they mean."""

  workdir: str | None = None
  config: config_dict.ConfigDict | None = None
  weights: str | None = None
  prompt: str | None = None
  prompts: str | None = None
  image: str | None = None
  video: str | None = None
  frames: int | None = None
  height: int | None = None
  width: int | None = None
  seed: int = 0
  out: str | None = None
  stage: str = "distill"
  dtype: str | None = None
  decoder: str | None = None
  tile: int | None = None
  strict: bool = False
  overwrite: bool = False
  peak_memory: bool = False
  plan: bool = False

  @property
  def changes(self) -> Changes:
    return Changes(
      **{field.name: getattr(self, field.name) for field in dataclasses.fields(Changes)}
    )


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video to make: `frames` new latent frames after `given` ones."""

  job: Job
  path: pathlib.Path
  start: Start | None
  given: int
  frames: int

  def provenance(self, model: StudentModel) -> dict[str, str]:
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


def generate(options: Options) -> list[pathlib.Path]:
  """Writes the videos and returns their paths."""
  jobs = read_jobs(options)
  paths = outputs(
    [job.prompt for job in jobs],
    options.out,
    options.prompts is not None,
    [job.out for job in jobs],
  )
  model = open_model(options)
  clips = plan_clips(model, jobs, paths, options)
  if options.plan:
    for given, frames in dict.fromkeys((clip.given, clip.frames) for clip in clips):
      print(
        model.plan(frames, given, min(model.experiment.sample.batch, len(clips))).text(), flush=True
      )
    return []
  wanted = [clip for clip in clips if options.overwrite or not is_done(clip, model)]
  if wanted:
    with jax.set_mesh(model.run.mesh):
      write_clips(model, wanted)
  if options.memory:
    print(peak_memory.peak().report(), file=sys.stderr)
  return paths


def read_jobs(options: Options) -> list[Job]:
  """One for each video. Raises UserError where the flags do not say which, or say it twice."""
  if (options.prompt is None) == (options.prompts is None):
    if not options.plan or options.prompt is not None:
      raise UserError('give either --prompt="a red circle moving left" or --prompts=FILE')
    return [Job("", options.seed)]
  if options.image and options.video:
    raise UserError("give either --image or --video: a video starts from one of them")
  start = {
    name: path and pathlib.Path(path)
    for name, path in (("image", options.image), ("video", options.video))
  }
  if options.prompt is not None:
    return [Job(options.prompt, options.seed, **start)]
  jobs = prompts_file.read_jobs(options.prompts, options.seed)
  return [job if job.image or job.video else dataclasses.replace(job, **start) for job in jobs]


def open_model(options: Options) -> StudentModel:
  """From the run, or from the config and weights.

  Raises UserError where neither is named, or both.
  """
  if options.config is not None:
    if options.workdir:
      raise UserError("give either --workdir, a trained run, or --config with --weights")
    return video_model.of_config(
      options.config, options.weights, options.changes, needed=not options.plan
    )
  if not options.workdir:
    raise UserError(
      "--workdir is missing; give the directory of a trained run, as --workdir=runs/shapes (or "
      "--config and --weights)"
    )
  if options.weights:
    raise UserError(
      "--weights needs --config, the config of the model; a --workdir has weights of its own"
    )
  return video_model.of_workdir(options.workdir, options.stage, options.changes)


def outputs(
  prompts: list[str], out: str | None, many: bool, named: list[str | None] | None = None
) -> list[pathlib.Path]:
  """A file per prompt: as `named`, else after the prompt."""
  named = named or [None] * len(prompts)
  taken = {name.removesuffix(".mp4") for name in named if name}
  if many:
    if out and pathlib.Path(out).is_file():
      raise UserError(f"--out={out} is a file; with --prompts it names the directory of the videos")
    names = [
      name or samples.file_name(prompt, taken) for prompt, name in zip(prompts, named, strict=True)
    ]
    return [pathlib.Path(out or "videos") / name for name in names]
  path = pathlib.Path(out or samples.file_name(prompts[0], taken))
  if path.suffix != ".mp4":
    raise UserError(f"--out={path}: expected a name that ends in .mp4")
  return [path]


def plan_clips(
  model: StudentModel, jobs: list[Job], paths: list[pathlib.Path], options: Options
) -> list[Clip]:
  """Reads every start once, so that what is wrong with one is said before hours of work; says once
  what was done to each.
  """
  e, clips, said = model.experiment, [], set()
  fitted: dict[int, int] = {}
  for job, path in zip(jobs, paths, strict=True):
    start, given = Start.of(job), 0
    if start:
      pixels, line = start.read(e)
      given = latent_frames(pixels, e)
      if line and line not in said:
        print(line, file=sys.stderr)
      said.add(line)
    if given not in fitted:
      fitted[given] = fit(model, options, given)
    clips.append(Clip(job, path, start, given, fitted[given]))
  return clips


def fit(model: StudentModel, options: Options, given: int) -> int:
  """New latent frames after the given ones, in whole blocks, saying so."""
  e = model.experiment
  if options.frames is None:
    frames = samples.long_frames(model.run) if options.workdir else e.data.frames
    return e.latent_frames(frames)
  latent, message = lengths.fit_blocks(
    options.frames, e.history.block, e.pixel_frames, given=given, strict=options.strict
  )
  if message:
    print(message, file=sys.stderr)
  return latent


def is_done(clip: Clip, model: StudentModel) -> bool:
  """Whether the file is there and was made of the same things; says so."""
  done = (
    clip.path.exists()
    and (read_metadata(clip.path) or {}).get("recipe") == clip.provenance(model)["recipe"]
  )
  if done:
    print(
      f"{clip.path} is there already, made of the same prompt, seed and weights; --overwrite "
      "makes it again",
      file=sys.stderr,
    )
  return done


def write_clips(model: StudentModel, clips: list[Clip]) -> None:
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
  model: StudentModel, params, clips: list[Clip], frames: int, given: int
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
    texts, seeds = (
      model.texts([clip.job.prompt for clip in rows]),
      np.asarray([clip.job.seed for clip in rows]),
    )
    yield batch, generate(params, texts, seeds, *start)


def start_latents(model: StudentModel, clip: Clip) -> np.ndarray:
  """[1 given h w c]"""
  pixels, _ = clip.start.read(model.experiment)
  return np.asarray(model.run.medium.latents(pixels[None]))


def write_clip(model: StudentModel, clip: Clip, latents: np.ndarray) -> None:
  """Decodes piece by piece into a file that says how it was made."""
  config = model.experiment.sample
  pieces = (piece[0] for piece in model.run.medium.pieces(latents))
  write_mp4(clip.path, pieces, config.fps, clip.provenance(model), scale=config.scale)
  print(clip.path, file=sys.stdout, flush=True)


def main() -> None:
  generate(
    Options(
      **{field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(Options)}
    )
  )


def define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config",
    None,
    "with --weights: a Python file with get_config(), and a variant",
    lock_config=True,
  )
  flags.DEFINE_string(
    "weights",
    None,
    "converted weights: a directory with dit/, and vae/, umt5/, tokenizer/ unless the config has "
    "them",
  )
  flags.DEFINE_string("workdir", None, "a run made by hiar_jax.train")
  flags.DEFINE_enum("stage", "distill", STAGES, "of the run: whose weights")
  flags.DEFINE_string("prompt", None, "what to show")
  flags.DEFINE_string(
    "prompts",
    None,
    "a file of prompts: .txt (one a line), .jsonl or .csv, with seeds, starts and names where "
    "wanted",
  )
  flags.DEFINE_string("image", None, "the first frame")
  flags.DEFINE_string(
    "video",
    None,
    "what goes before: the most whole blocks at its end are kept, and the new frames follow",
  )
  flags.DEFINE_integer(
    "frames",
    None,
    "of the video, with given ones; default: four training lengths of a --workdir, one of a "
    "--config",
  )
  flags.DEFINE_integer("height", None, "in pixels; default: the config's", 1)
  flags.DEFINE_integer("width", None, "in pixels; default: the config's", 1)
  flags.DEFINE_integer(
    "seed", 0, "of the first prompt; the next ones count up", 0, prompts_file.MAX_SEED
  )
  flags.DEFINE_string("out", None, "the mp4, or with --prompts a directory")
  flags.DEFINE_enum("dtype", None, DTYPES, "of weights and products; default: the config's")
  flags.DEFINE_enum("decoder", None, video_model.DECODERS, "Wan's autoencoder, or the tiny one")
  flags.DEFINE_integer(
    "tile",
    None,
    "encode and decode in tiles of so many latents a side, for small memories; 0: whole frames",
    0,
  )
  flags.DEFINE_bool(
    "strict", False, "refuse frame counts that are not whole blocks, instead of rounding up"
  )
  flags.DEFINE_bool("overwrite", False, "make again what is there already")
  flags.DEFINE_bool("memory", False, "say how much memory it took")
  flags.DEFINE_bool("plan", False, "say what it would cost, load nothing, write nothing")


if __name__ == "__main__":
  define_flags()
  configs.run_flags(main)
