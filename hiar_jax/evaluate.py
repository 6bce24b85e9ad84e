"""Measures runs of the shapes world side by side:

    python -m hiar_jax.evaluate --out=runs/compare \
      --workdirs=runs/shapes,runs/self_forcing,runs/self_aligned,runs/no_forward_kl

Rows: true clips, true clips through the codec, the teacher (at its training length), the causal
init under each run's history, and each run's student. Same held-out prompts, same seeds. Writes
metrics.json, table.md, fifths.png and a contact sheet per row.
"""

import dataclasses
import json
import pathlib
import re

from absl import flags
import jax
import numpy as np

from hiar_jax.components import patch_pca
from hiar_jax.config import command_line as configs
from hiar_jax.errors import UserError
from hiar_jax.evaluation import report, shapes_truth
from hiar_jax.files import write_atomic
from hiar_jax.method import Method
from hiar_jax.training import pretrained, samples
from hiar_jax.training.run import Run, open_run, read_config
from hiar_jax.video.contact_sheet import contact_sheet
from hiar_jax.video.png import write_png

_WORKDIRS = flags.DEFINE_list(
  "workdirs", None, "trained runs; the first one's teacher and causal init are measured too"
)
_OUT = flags.DEFINE_string("out", None, "directory of the results")
_VIDEOS = flags.DEFINE_integer(
  "videos", 54, "videos a row; held-out prompts are repeated with other seeds"
)
_LENGTH = flags.DEFINE_float("length", 4.0, "training lengths of a video")
_SEED = flags.DEFINE_integer("seed", 1000, "of the first video; not those of the sample stage")


def main() -> None:
  if not _WORKDIRS.value or not _OUT.value:
    raise UserError("give --workdirs=runs/a,runs/b and --out=DIR")
  runs = [open_run(read_config(workdir), workdir, save=False) for workdir in _WORKDIRS.value]
  first, out = runs[0], pathlib.Path(_OUT.value)
  prompts = first.held_out(_VIDEOS.value)
  frames = samples.round_to_blocks(first, round(_LENGTH.value * first.experiment.data.frames))
  results = references(first, frames)
  for name, videos in rows(runs, prompts, frames):
    results[name] = shapes_truth.measure(videos, prompts, first.world, first.experiment.data.frames)
    save_sheet(first, out, name, videos, prompts)
    print(report.format_table({name: results[name]}).splitlines()[-1], flush=True)
  table = report.format_table(results)
  write_atomic(out / "metrics.json", json.dumps(results, indent=2).encode())
  write_atomic(out / "table.md", (table + "\n").encode())
  report.plot(
    {name: result for name, result in results.items() if result["settings"]["frames"] == frames},
    out / "fifths.png",
  )
  print(table)


def references(run: Run, frames: int) -> dict[str, dict]:
  """What a perfect model would score, and what the codec alone costs."""
  codec = run.components.codec
  through = lambda videos: np.asarray(patch_pca.decode(codec, patch_pca.encode(codec, videos)))
  return {
    "true clips": shapes_truth.data_reference(run.world, frames=frames),
    "true clips through the codec": shapes_truth.data_reference(run.world, through, frames=frames),
  }


def rows(runs: list[Run], prompts: list[str], frames: int):
  """(name, videos uint8) of each row."""
  first = runs[0]
  yield "teacher, training length", teacher_videos(first, prompts)
  orders: dict[str, Method] = {}
  for run in runs:
    orders.setdefault(f"causal init, {label(run.experiment.history)}", run.experiment.history)
  weights = pretrained.load_weights(first, "causal_init")
  for name, method in orders.items():
    changed = dataclasses.replace(
      first, experiment=dataclasses.replace(first.experiment, history=method)
    )
    yield name, samples.make_videos(changed, weights, prompts, frames, _SEED.value, name)
  for run in runs:
    name = f"{run.workdir.name}, {label(run.experiment.history)}"
    yield (
      name,
      samples.make_videos(
        run, pretrained.load_weights(run, "distill"), prompts, frames, _SEED.value, name
      ),
    )


def label(method: Method) -> str:
  """`step-first, output history` and the like."""
  sink = f", sink {method.sink}" if method.sink else ""
  return f"{method.order.replace('_', '-')}, {method.level} history{sink}"


def teacher_videos(run: Run, prompts: list[str]) -> np.ndarray:
  """The teacher's clips: it is bidirectional, so they have the training length."""
  sample = run.teacher_sampler(jax.random.key(_SEED.value))
  points = sample(pretrained.load(run), run.tokens(prompts), np.arange(len(prompts)))
  return run.pixels(points[:, -1])


def save_sheet(
  run: Run, out: pathlib.Path, name: str, videos: np.ndarray, prompts: list[str]
) -> None:
  out.mkdir(parents=True, exist_ok=True)
  shown = {prompt: video for prompt, video in list(zip(prompts, videos, strict=True))[:8]}
  sheet = contact_sheet(shown, title=name, train_frames=run.experiment.data.frames)
  write_png(out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png", sheet)


if __name__ == "__main__":
  configs.run_flags(main)
