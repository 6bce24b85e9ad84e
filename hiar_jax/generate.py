"""Makes videos from a trained run: `python -m hiar_jax.generate --workdir=runs/shapes --prompt="a red circle moving left" --out=clip.mp4`.

The same prompt and seed give the same video, alone or among others (`--prompts=file`, one prompt a line, seeds counting up).
"""

import pathlib
import sys

from absl import flags
import jax

from hiar_jax import config as configs
from hiar_jax.data import pipeline
from hiar_jax.errors import UserError
from hiar_jax.stages import sample, teacher
from hiar_jax.stages.run import open_run, read_config

STAGES = ("distill", "causal_init")


def outputs(prompts: list[str], out: str | None, many: bool) -> list[pathlib.Path]:
  """A file per prompt."""
  taken: set[str] = set()
  if many:
    if out and pathlib.Path(out).is_file():
      raise UserError(f"--out={out} is a file; with --prompts it names the directory of the videos")
    return [pathlib.Path(out or "videos") / sample.file_name(prompt, taken) for prompt in prompts]
  path = pathlib.Path(out or sample.file_name(prompts[0], taken))
  if path.suffix != ".mp4":
    raise UserError(f"--out={path}: expected a name that ends in .mp4")
  return [path]


def generate(
  workdir: str, *, prompt: str | None = None, prompts: str | None = None, frames: int | None = None, seed: int = 0,
  out: str | None = None, stage: str = "distill", strict: bool = False,
) -> list[pathlib.Path]:  # fmt: skip
  """Writes the videos and returns their paths; what the arguments mean is said by `--help`."""
  if not workdir:
    raise UserError("--workdir is missing; give the directory of a trained run, as --workdir=runs/shapes")
  if (prompt is None) == (prompts is None):
    raise UserError('give either --prompt="a red circle moving left" or --prompts=FILE')
  wanted = [prompt] if prompt is not None else pipeline.read_prompts(prompts)
  paths = outputs(wanted, out, many=prompts is not None)
  run = open_run(read_config(workdir), workdir, save=False)
  frames = sample.long_frames(run) if frames is None else sample.round_to_blocks(run, frames, strict)
  with jax.set_mesh(run.mesh):
    for text in wanted:
      sample.tell_unknown(run, text)
    params = teacher.load_weights(run, stage)
    seeds = range(seed, seed + len(wanted))
    jobs = zip(paths, wanted, seeds, strict=True)
    for videos in sample.iterate_videos(run, params, wanted, frames, seeds, "generate"):
      for video, (path, text, number) in zip(videos, jobs, strict=False):  # jobs go on in the next batch
        sample.save_video(run, path, video, text, number)
        print(path, file=sys.stdout, flush=True)
  return paths


def main() -> None:
  f = flags.FLAGS
  generate(
    f.workdir, prompt=f.prompt, prompts=f.prompts, frames=f.frames, seed=f.seed, out=f.out, stage=f.stage, strict=f.strict
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "a run made by hiar_jax.train")
  flags.DEFINE_string("prompt", None, "what to show")
  flags.DEFINE_string("prompts", None, "a file of prompts, one a line")
  flags.DEFINE_integer("frames", None, "frames of the video; default: four training lengths")
  flags.DEFINE_integer("seed", 0, "of the first prompt; the next ones count up", 0, 2**31 - 1)
  flags.DEFINE_string("out", None, "the mp4, or with --prompts a directory")
  flags.DEFINE_enum("stage", "distill", STAGES, "whose weights")
  flags.DEFINE_bool("strict", False, "refuse frame counts that are not whole blocks, instead of rounding up")
  configs.run_flags(main)
