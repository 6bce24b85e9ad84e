"""Generates videos from a trained run, or from a config and converted weights.

    python -m hiar_jax.generate --workdir=runs/shapes --prompt="a red circle" --out=clip.mp4
    python -m hiar_jax.generate --config=experiments/hiar_wan_1_3b.py --weights=weights/hiar \
      --prompt="A cat walks on grass" --out=clip.mp4

The same prompt and seed give the same video, alone or among others (`--prompts=FILE`, see
generation/prompts_file.py). A video continues the frames of `--image` or `--video`. A file that
exists and was made of the same prompt, seed and weights is kept. `--dry_run` prints the memory and
FLOPs that it would need, and loads nothing.

A packed model (FramePack) also makes videos that end with `--end_image` or `--end_video` or come
back to their start (`--loop`), with prompts by the second (`--timeline`) and single sections drawn
anew (`--takes`); they can be watched while they are made (`--partial`).
"""

import dataclasses
import pathlib
import sys

from absl import flags
import jax

from hiar_jax import peak_memory
from hiar_jax.config import command_line as configs
from hiar_jax.errors import UserError
from hiar_jax.generation import clips, dry_run, prompts_file
from hiar_jax.generation.model_options import ModelOptions, define_model_flags
from hiar_jax.generation.partial_video import PartialVideos
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.sections import check_told

FILES = ("image", "video"), ("end_image", "end_video")  # what a video starts and ends with
# Former names of flags -> today's; see config.command_line.
RENAMED = {"memory": "report_memory", "plan": "dry_run"}


@dataclasses.dataclass(frozen=True)
class GenerateOptions(ModelOptions):
  """Values of the flags of `define_flags`, by their names."""

  prompt: str | None = None
  prompts: str | None = None
  image: str | None = None
  video: str | None = None
  frames: int | None = None
  seed: int = 0
  out: str | None = None
  strict: bool = False
  overwrite: bool = False
  report_memory: bool = False
  dry_run: bool = False
  end_image: str | None = None
  end_video: str | None = None
  loop: bool = False
  order: str | None = None
  timeline: str | None = None
  takes: str | None = None
  partial: bool = False


def generate(options: GenerateOptions) -> list[pathlib.Path]:
  """Writes the videos and returns their paths; for a dry run prints the costs and returns [].

  Raises UserError for bad flags, prompts, conditioning files or weights.
  """
  # all that can be wrong with the input is checked before weights are loaded
  jobs = read_jobs(options)
  paths = clips.output_paths(jobs, options.out, many=options.prompts is not None)
  model = options.open_model(needed=not options.dry_run)
  check_told(model.experiment, ["partial"] if options.partial else [])
  planned = clips.plan_clips(model, jobs, paths, options.frames, strict=options.strict)
  if options.dry_run:
    for line in dry_run.lines(model, planned):
      print(line, flush=True)
    return []
  wanted = [clip for clip in planned if options.overwrite or not clip.is_done(model)]
  if wanted:
    with jax.set_mesh(model.run.mesh):
      clips.write_clips(model, wanted, PartialVideos(model) if options.partial else None)
  if options.report_memory:
    print(peak_memory.report(*peak_memory.peak()), file=sys.stderr)
  return paths


def read_jobs(options: GenerateOptions) -> list[Job]:
  """Returns one job per video. Raises UserError for missing or contradicting flags."""
  sources = options.prompt is not None, options.prompts is not None
  # a timeline may hold all that a prompt would say
  if all(sources) or not any((*sources, options.timeline is not None)):
    # a dry run may leave out both: its costs do not depend on the prompt
    if not options.dry_run or options.prompt is not None:
      raise UserError('give either --prompt="a red circle moving left" or --prompts=FILE')
    return [Job("", options.seed)]
  # made for --prompts too: it checks the other flags, and holds what they say
  files = {name: getattr(options, name) for group in FILES for name in group}
  told = {name: getattr(options, name) for name in ("loop", "order", "timeline", "takes")}
  (given,) = prompts_file.make_jobs([options.prompt or ""], options.seed, **files, **told)
  if options.prompts is None:
    return [given]
  jobs = prompts_file.read_jobs(options.prompts, options.seed)
  return [_with_defaults(job, given) for job in jobs]


def _with_defaults(job: Job, given: Job) -> Job:
  """Returns a job of a file with what the flags say, where its row says nothing of the kind."""
  loop = given.loop and not (job.end_image or job.end_video)
  said = {"order": given.order, "loop": loop}
  for names in (*FILES, ("timeline",), ("takes",)):
    if not any(getattr(job, name) for name in names):
      said |= {name: getattr(given, name) for name in names}
  return dataclasses.replace(job, **said)


def main() -> None:
  """Generates with the options that the absl flags hold."""
  names = [field.name for field in dataclasses.fields(GenerateOptions)]
  generate(GenerateOptions(**{name: getattr(flags.FLAGS, name) for name in names}))


def define_flags() -> None:
  """Defines an absl flag for each field of `GenerateOptions`."""
  define_model_flags()
  flags.DEFINE_string("prompt", None, "text of the video")
  configs.define_path(
    "prompts",
    None,
    "a file of prompts: .txt (one a line), .jsonl or .csv, with seeds, starts and names where "
    "wanted",
  )
  configs.define_path("image", None, "picture that becomes the first frame")
  configs.define_path(
    "video",
    None,
    "video to continue: the most whole blocks at its end are kept, and the new frames follow",
  )
  define_section_flags()
  flags.DEFINE_integer(
    "frames",
    None,
    "frames of the video, given ones included; default: four training lengths of a --workdir, one "
    "of a --config",
  )
  flags.DEFINE_integer(
    "seed",
    0,
    "random seed of the noise of the first prompt; the next ones count up",
    0,
    prompts_file.MAX_SEED,
  )
  configs.define_path("out", None, "the mp4 to write, or with --prompts a directory")
  flags.DEFINE_bool(
    "strict", False, "refuse frame counts that are not whole blocks, instead of rounding up"
  )
  flags.DEFINE_bool("overwrite", False, "make again the videos that are there already")
  flags.DEFINE_bool("report_memory", False, "print the most memory that was used")
  flags.DEFINE_bool("dry_run", False, "print what it would cost; load nothing, write nothing")


def define_section_flags() -> None:
  """Defines the flags of what packed models alone can do (docs/framepack.md)."""
  configs.define_path("end_image", None, "packed models: picture that becomes the last frame")
  configs.define_path(
    "end_video", None, "packed models: video that follows the new frames, which lead up to it"
  )
  flags.DEFINE_bool("loop", False, "packed models: the end comes back to the start")
  flags.DEFINE_string(
    "order",
    None,
    "packed models: order of the sections, vanilla, both_ends, inverted or endpoints:0,3,7 (these "
    "first); default: the run's",
  )
  flags.DEFINE_string(  # a text, or a path: timeline.read tells them apart
    "timeline",
    None,
    "packed models: prompts by the second, added to --prompt, as '0s: at night, 5s: by day', or a "
    "file of them",
  )
  flags.DEFINE_string(
    "takes",
    None,
    "packed models: sections that are drawn anew, as 2:5 (section 2, counted from 0, with seed 5)",
  )
  flags.DEFINE_bool(
    "partial",
    False,
    "packed models: after each step of the order write what is there of the video beside --out, as "
    "NAME.partial.mp4 and NAME.steps.png",
  )


if __name__ == "__main__":
  define_flags()
  configs.run_flags(main, renamed=RENAMED)
