"""Makes videos from a trained run: `python -m hiar_jax.generate --workdir=runs/shapes --prompt="a red circle moving left" --out=clip.mp4`.

The same prompt and seed give the same video, alone or among others (`--prompts=file`, one prompt a line, seeds counting up).
"""

import pathlib
import sys

from absl import flags
import jax
from ml_collections import config_dict

from hiar_jax import config as configs
from hiar_jax.data import pipeline
from hiar_jax.errors import UserError
from hiar_jax.stages import sample, teacher
from hiar_jax.stages.run import open_run

_WORKDIR = flags.DEFINE_string("workdir", None, "a run made by hiar_jax.train")
_PROMPT = flags.DEFINE_string("prompt", None, "what to show")
_PROMPTS = flags.DEFINE_string("prompts", None, "a file of prompts, one a line")
_FRAMES = flags.DEFINE_integer("frames", None, "frames of the video; default: four training lengths")
_SEED = flags.DEFINE_integer("seed", 0, "of the first prompt; the next ones count up")
_OUT = flags.DEFINE_string("out", None, "the mp4, or with --prompts a directory")
_STAGE = flags.DEFINE_enum("stage", "distill", ["distill", "causal_init"], "whose weights")
_STRICT = flags.DEFINE_bool("strict", False, "refuse frame counts that are not whole blocks, instead of rounding up")


def read_config(workdir: str) -> config_dict.ConfigDict:
  """The resolved config of a run."""
  stored = configs.read_resolved(workdir)
  if stored is None:
    raise UserError(f"--workdir={workdir} holds no run (no {configs.RESOLVED}); train one first, or check the path")
  return config_dict.ConfigDict(stored)


def outputs(prompts: list[str], out: str | None, many: bool) -> list[pathlib.Path]:
  """A file per prompt."""
  taken: set[str] = set()
  if many:
    return [pathlib.Path(out or "videos") / sample.file_name(prompt, taken) for prompt in prompts]
  path = pathlib.Path(out or sample.file_name(prompts[0], taken))
  if path.suffix != ".mp4":
    raise UserError(f"--out={path}: expected a name that ends in .mp4")
  return [path]


def main() -> None:
  if not _WORKDIR.value:
    raise UserError("--workdir is missing; give the directory of a trained run, as --workdir=runs/shapes")
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise UserError('give either --prompt="a red circle moving left" or --prompts=FILE')
  prompts = [_PROMPT.value] if _PROMPT.value is not None else pipeline.read_prompts(_PROMPTS.value)
  paths = outputs(prompts, _OUT.value, many=_PROMPTS.value is not None)
  run = open_run(read_config(_WORKDIR.value), _WORKDIR.value, save=False)
  frames = sample.long_frames(run) if _FRAMES.value is None else sample.round_to_blocks(run, _FRAMES.value, _STRICT.value)
  with run.writer, jax.set_mesh(run.mesh):
    for prompt in prompts:
      sample.tell_unknown(run, prompt)
    params = teacher.load_weights(run, _STAGE.value)
    seeds = range(_SEED.value, _SEED.value + len(prompts))
    jobs = zip(paths, prompts, seeds, strict=True)
    for videos in sample.iterate_videos(run, params, prompts, frames, seeds, "generate"):
      for video, (path, prompt, seed) in zip(videos, jobs):
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.save_video(run, path, video, prompt, seed)
        print(path, file=sys.stdout)


if __name__ == "__main__":
  configs.run_flags(main)
