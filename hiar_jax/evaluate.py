"""Measures runs of the shapes world side by side:

    python -m hiar_jax.evaluate --out=runs/compare \
      --workdirs=runs/shapes,runs/self_forcing,runs/self_aligned,runs/no_forward_kl

Rows: true clips, true clips through the codec, the teacher (at its training length), the causal
init with each run's method, and each run's student; same held-out prompts, same seeds. Writes
metrics.json, table.md, fifths.png and a contact sheet per row.
"""

import dataclasses
import json
import pathlib
import re

from absl import flags
import jax
import numpy as np

from hiar_jax.config import command_line as configs
from hiar_jax.errors import UserError
from hiar_jax.evaluation import report, shapes_truth
from hiar_jax.files import write_atomic
from hiar_jax.method import MethodConfig
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
_SEED = flags.DEFINE_integer(
  "seed", 1000, "random seed of the first video; other than those of the sample stage"
)


def main() -> None:
  """Measures all rows and writes the results; prints each row as it is measured."""
  if not _WORKDIRS.value or not _OUT.value:
    raise UserError("give --workdirs=runs/a,runs/b and --out=DIR")
  runs = [open_run(read_config(workdir), workdir, save=False) for workdir in _WORKDIRS.value]
  first, out = runs[0], pathlib.Path(_OUT.value)
  prompts = first.held_out(_VIDEOS.value)
  given = samples.given_pixels(first)
  made = round(_LENGTH.value * (first.experiment.data.frames - given))
  frames = samples.round_to_blocks(first, given + made) - given
  results = references(first, frames)
  for name, videos in rows(runs, prompts, frames):
    results[name] = shapes_truth.measure(videos, prompts, first.world, first.experiment.data.frames)
    shown = dict(list(zip(prompts, videos, strict=True))[:8])  # the first eight videos
    if first.world.hidden:  # few prompts, that leave the colour open: one of each would not show it
      count = min(8, len(prompts))
      spread = [i * len(prompts) // count for i in range(count)]
      shown = {f"{prompts[i]}, video {i}": videos[i] for i in spread}
    sheet = contact_sheet(shown, title=name, train_frames=first.experiment.data.frames)
    write_png(out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.png", sheet)
    print(report.format_table({name: results[name]}).splitlines()[-1], flush=True)
  table = report.format_table(results)
  write_atomic(out / "metrics.json", json.dumps(results, indent=2).encode())
  write_atomic(out / "table.md", (table + "\n").encode())
  # Fifths of videos of other lengths (the teacher's) cannot be drawn over the same axis.
  drawn = {
    name: result for name, result in results.items() if result["settings"]["frames"] == frames
  }
  report.plot(drawn, out / "fifths.png")
  print(table)


def references(run: Run, frames: int) -> dict[str, dict]:
  """Returns the measures of true clips, and of true clips through the codec alone."""

  def roundtrip(videos):
    return run.pixels(run.autoencoder.latents(videos))

  return {
    "true clips": shapes_truth.data_reference(run.world, frames=frames),
    "true clips through the codec": shapes_truth.data_reference(
      run.world, roundtrip, frames=frames
    ),
  }


def rows(runs: list[Run], prompts: list[str], frames: int):
  """Yields (name, videos uint8 [n, f, H, W, 3]) of each row, one at a time to bound memory.

  frames: those that are made; frames that a model is given are not among them.
  """
  first = runs[0]
  # The teacher is bidirectional: its clips have the training length.
  sample = first.teacher_sampler(jax.random.key(_SEED.value))
  points = sample(pretrained.load_teacher(first), first.texts(prompts), np.arange(len(prompts)))
  yield "teacher, training length", first.pixels(points[:, -1])  # [b points f h w c], data last
  # Causal students of the same method share a row.
  students = [run for run in runs if run.experiment.framepack is None]
  methods: dict[str, MethodConfig] = {}
  for run in students:
    methods.setdefault(f"causal init, {row_label(run)}", run.experiment.history)
  for name, method in methods.items():
    weights = pretrained.load_weights(students[0], "causal_init")
    experiment = dataclasses.replace(students[0].experiment, history=method)
    changed = dataclasses.replace(students[0], experiment=experiment)
    yield name, samples.make_videos(changed, weights, prompts, frames, _SEED.value, name)
  for run in runs:
    name = f"{run.workdir.name}, {row_label(run)}"
    weights = pretrained.load_weights(run, run.experiment.last_stage)
    yield name, samples.without_given(run, weights, prompts, frames, _SEED.value, name)


def row_label(run: Run) -> str:
  """Returns how a run makes videos, for the table: as `step-first, output history`, or, of a packed
  model, `td_f16k4f2k2f1k1_g9, vanilla`.
  """
  e = run.experiment
  if e.framepack:
    sort = ", sorted by similarity" if e.framepack.history.similar else ""
    return f"{e.framepack.packing}, {e.sample.order.replace('_', ' ')}{sort}"
  method = e.history
  sink = f", sink {method.sink}" if method.sink else ""
  return f"{method.order.replace('_', '-')}, {method.level} history{sink}"


if __name__ == "__main__":
  configs.run_flags(main)
