"""Measures runs of the shapes world side by side, with intervals:

    python -m hiar_jax.evaluate --out=runs/compare \
      --workdirs=runs/shapes,runs/self_forcing,runs/self_aligned,runs/no_forward_kl

Rows: true clips, true clips through the codec, the teacher (at its training length), the causal
init of each method, and each run's student, all of one world and clip length; same held-out
prompts, same seeds. Writes metrics.json, table.md, fifths.png and a contact sheet per row, and for
each row a small file of what every video measures (to OUT/rows, or --rows). Such files alone make
the same tables:

    python -m hiar_jax.evaluate --from=runs/compare/rows --out=runs/table

so that a table of many runs is made in as many sittings as it takes (--baselines= leaves out what
is no run's own). docs/evaluate.md says what the numbers and their intervals are.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import os
import pathlib

from absl import flags
import numpy as np

from hiar_jax.config import command_line as configs
from hiar_jax.config.workdir import difference, to_json
from hiar_jax.errors import MAX_NOISE_SEED, UserError, above
from hiar_jax.evaluation import report, shapes_truth
from hiar_jax.evaluation import rows as row_files
from hiar_jax.evaluation.rows import Row
from hiar_jax.files import writing
from hiar_jax.rollout.noise import seed_key
from hiar_jax.training import pretrained, samples
from hiar_jax.training.lineage import BORROWED, DEPENDS
from hiar_jax.training.run import Run, open_run, read_config
from hiar_jax.video.contact_sheet import contact_sheet
from hiar_jax.video.png import write_png

# Kinds of rows that are no run's own.
KINDS = ("data", "codec", "teacher", "causal_init")

_WORKDIRS = configs.define_paths(
  "workdirs", "trained runs; the first one's teacher and their causal inits are measured too"
)
_FROM = configs.define_paths(
  "from", "files of rows, or folders of them, that a table is made from instead of runs"
)
_OUT = configs.define_path("out", None, "directory of the results")
_ROWS = configs.define_path("rows", None, "directory of the rows' files; by default OUT/rows")
_REFERENCE = flags.DEFINE_string(
  "reference", None, "the row that the others are compared with; by default the first run's"
)
_BASELINES = flags.DEFINE_list(
  "baselines",
  list(KINDS),
  "rows beside the runs: true clips (data), these through the codec, the teacher, the causal "
  "inits; --baselines= measures none",
)
_NO_BASELINES = flags.DEFINE_boolean("nobaselines", False, "the earlier form of --baselines=")
_VIDEOS = flags.DEFINE_integer(
  "videos", 54, "videos a row; held-out prompts are repeated with other seeds", 1
)
_LENGTH = flags.DEFINE_float("length", 4.0, "training lengths of a video")
_SEED = flags.DEFINE_integer(
  "seed",
  1000,
  "random seed of the first video; other than those of the sample stage",
  0,
  MAX_NOISE_SEED,
)

# The groups that the stages from data to causal_init depend on; the history is said by its row.
SHARED_GROUPS = tuple(
  {
    name.partition(".")[0]: None
    for stage in BORROWED
    for name in DEPENDS[stage]
    if name != "history"
  }
)
_UNFINISHED = flags.DEFINE_boolean(
  "unfinished", False, "measure runs at their newest checkpoint, where they are not finished too"
)

# Groups of a config that a run's videos do not depend on, or that name places on a disk.
OTHER_GROUPS = ("log", "mesh", "sample", "stages_from")
# Fields of `sample` that the videos of a packed model depend on.
PACKED_SAMPLING = ("order", "steps", "guidance", "discretised")


@dataclasses.dataclass(frozen=True)
class Planned:
  """A row to be measured. config: groups that its videos depend on. make: returns them, uint8 [n f
  H W 3].
  """

  name: str
  kind: str
  prompts: list[str]
  config: dict
  make: Callable[[], np.ndarray]


def main() -> None:
  """Measures all rows, or reads them, and writes the results."""
  if bool(_WORKDIRS.value) == bool(_FROM.value) or not _OUT.value:
    raise UserError(
      "give --out=DIR, and either --workdirs=runs/a,runs/b or --from=DIR, a folder of rows' files"
    )
  if unknown := set(_BASELINES.value) - set(KINDS):
    raise UserError(f"--baselines={','.join(sorted(unknown))}: expected some of {','.join(KINDS)}")
  above(0, **{"--length": _LENGTH.value})
  out = pathlib.Path(_OUT.value)
  found = row_files.read_all(_FROM.value) if _FROM.value else measured(out)
  print(report.write(found, out, _REFERENCE.value))


def measured(out: pathlib.Path) -> list[Row]:
  """Makes and measures the videos of all rows, in a table's order; prints each row as it is
  measured, and writes its file and its contact sheet.
  """
  runs = [open_run(read_config(workdir), workdir, save=False) for workdir in _WORKDIRS.value]
  first, found = runs[0], []
  given = samples.given_pixels(first)
  made = round(_LENGTH.value * (first.experiment.data.frames - given))
  frames = samples.round_to_blocks(first, given + made) - given
  check_together(runs, frames)  # before hours of work
  for run in runs:
    step_of(run, run.experiment.last_stage)  # raises too
  prompts = first.held_out(_VIDEOS.value)
  kinds = () if _NO_BASELINES.value else _BASELINES.value
  planned = [part for part in baselines(runs, prompts, frames) if part.kind in kinds]
  directory = pathlib.Path(_ROWS.value or out / "rows")
  for folder in (out, directory):  # before hours of work too
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
  for part in planned + [of_run(run, prompts, frames) for run in runs]:
    row_files.check_free(directory, part.name, part.config)
    videos = part.make()
    world, train_frames = first.world, first.experiment.data.frames
    judged = shapes_truth.judge(videos, part.prompts, world, train_frames)
    facts = {"name": part.name, "kind": part.kind, "config": part.config, "command": command()}
    row = row_files.of_judged(judged, **facts, settings={"seed": _SEED.value})
    row_files.write(directory, row)
    found.append(row)
    if part.kind not in ("data", "codec"):
      write_sheet(first, part, videos, out)
    print(report.format_table({row.name: report.result_of(row)}).splitlines()[-1], flush=True)
  return row_files.in_order(found)


def check_together(runs: list[Run], frames: int) -> None:
  """Raises UserError for runs that no one table can hold: of one name, without a truth or with
  different ones, or that cannot make videos of `frames` new frames.
  """
  names = [run_name(run) for run in runs]
  if len(set(names)) < len(names):
    raise UserError(f"--workdirs: runs of one name ({'; '.join(names)}); rename a folder")
  # which clips were trained on is no matter of the truth
  first, *others = [dataclasses.replace(run.world, later=0.0) for run in runs]
  apart = "measure it in a sitting of its own (another --rows and --out)"
  for name, world, run in zip(names[1:], others, runs[1:], strict=True):
    lines = difference(*map(dataclasses.asdict, (first, world)))
    if lines:
      raise UserError(
        f"--workdirs: {name!r} has other clips to be measured against than {names[0]!r} "
        f"(data, {names[0]} -> {name}: {'; '.join(lines)}); {apart}"
      )
    start = samples.given_pixels(run)
    try:
      samples.round_to_blocks(run, start + frames, strict=True)
    except UserError as error:
      raise UserError(
        f"--workdirs: {name!r}: {error}; take another --length, or {apart}"
      ) from error


def baselines(runs: list[Run], prompts: list[str], frames: int) -> list[Planned]:
  """Returns true clips, the same through the codec, the first run's teacher, and the causal init of
  each method (causal_inits).
  """
  first = runs[0]
  clips, captions = shapes_truth.true_clips(first.world, frames=frames)

  def teacher():
    # bidirectional: its clips have the training length
    sample = first.teacher_sampler(seed_key(_SEED.value))
    points = sample(pretrained.load_teacher(first), first.texts(prompts), np.arange(len(prompts)))
    samples.check_finite(points[:, -1], "teacher")
    return first.pixels(points[:, -1])  # [b points f h w c], data last

  pixels = first.experiment.codec.spatial_factor
  data, codec = config_of(first, ("data",)), config_of(first, ("data", "codec", "seed"))
  groups = config_of(first, [name for name in SHARED_GROUPS if name != "causal_init"])
  planned = [
    Planned("true clips", "data", captions, data, lambda: clips),
    Planned(
      f"true clips through the codec of {pixels} x {pixels} pixels",
      "codec",
      captions,
      codec,
      lambda: first.pixels(first.autoencoder.latents(clips)),
    ),
    Planned("teacher, training length", "teacher", prompts, groups, teacher),
  ]
  for name, run in causal_inits(runs).items():
    make = functools.partial(videos_of, run, "causal_init", prompts, frames, name)
    config = config_of(run, (*SHARED_GROUPS, "history"))
    planned.append(Planned(name, "causal_init", prompts, config, make))
  return planned


def causal_inits(runs: list[Run]) -> dict[str, Run]:
  """Returns the rows of causal inits -> the first run with each: those of the same weights that
  make videos by the same method share one. Where methods of one label do not, rows have the run's
  name too.
  """
  found: dict[tuple, Run] = {}
  for run in runs:
    e = run.experiment
    if e.framepack is None:
      place = os.path.realpath(e.weights.student or run.directory("causal_init"))
      # the gradient is of the training after it
      method = dataclasses.replace(run.method, gradient="detached")
      found.setdefault((place, method, e.seed), run)
  labels = [row_label(run) for run in found.values()]
  named = [
    f"causal init{'' if labels.count(label) == 1 else f' of {run.workdir.name}'}, {label}"
    for label, run in zip(labels, found.values(), strict=True)
  ]
  return dict(zip(named, found.values(), strict=True))


def of_run(run: Run, prompts: list[str], frames: int) -> Planned:
  """Returns the row of a run's last stage."""
  name = run_name(run)
  make = functools.partial(videos_of, run, run.experiment.last_stage, prompts, frames, name)
  config = config_of(
    run, [group for group in read_config(run.workdir) if group not in OTHER_GROUPS]
  )
  if run.experiment.framepack:
    sample = config_of(run, ("sample",))["sample"]
    config["sample"] = {field: sample[field] for field in PACKED_SAMPLING if field in sample}
  return Planned(name, "run", prompts, config, make)


def videos_of(run: Run, stage: str, prompts: list[str], frames: int, name: str) -> np.ndarray:
  """Returns videos by the weights of a stage; frames that a model is given are not among them."""
  weights = pretrained.load_weights(run, stage, step_of(run, stage))
  return samples.without_given(run, weights, prompts, frames, _SEED.value, name)


def step_of(run: Run, stage: str) -> int | None:
  """Returns the step of a stage's weights. Raises UserError where it is not finished, without
  --unfinished.
  """
  return pretrained.step_of(run, stage, unfinished=_UNFINISHED.value)


def config_of(run: Run, groups: Iterable[str]) -> dict:
  """Returns groups of the run's resolved config; one that it lacks is left out."""
  config = to_json(read_config(run.workdir))
  return {group: config[group] for group in groups if group in config}


def command() -> str:
  """Returns the command that makes these rows: what it measures, without where it writes."""
  # of absolute paths the folders' names: a row says the same wherever it was made
  workdirs = [
    path if not os.path.isabs(path) else pathlib.Path(path).name for path in _WORKDIRS.value
  ]
  settings = f"--videos={_VIDEOS.value} --length={_LENGTH.value:g} --seed={_SEED.value}"
  return f"python -m hiar_jax.evaluate --workdirs={','.join(workdirs)} {settings}"


def write_sheet(first: Run, part: Planned, videos: np.ndarray, out: pathlib.Path) -> None:
  """Writes the contact sheet of a row's first eight videos."""
  shown = dict(list(zip(part.prompts, videos, strict=True))[:8])
  if first.world.hidden:  # few prompts, that leave the colour open: one of each would not show it
    count = min(8, len(videos))
    spread = [i * len(videos) // count for i in range(count)]
    shown = {f"{part.prompts[i]}, video {i}": videos[i] for i in spread}
  sheet = contact_sheet(shown, title=part.name, train_frames=first.experiment.data.frames)
  write_png((out / row_files.file_name(part.name)).with_suffix(".png"), sheet)


def run_name(run: Run) -> str:
  """Returns the name of a run's row."""
  return f"{run.workdir.name}, {row_label(run)}"


def row_label(run: Run) -> str:
  """Returns how a run makes videos, for the table: as `step-first, output history`, or, of a packed
  model, `td_f16k4f2k2f1k1_g9, vanilla`.
  """
  e = run.experiment
  if e.framepack:
    sort = ", sorted by similarity" if e.framepack.history.similar else ""
    as_it_is = e.framepack.parsed.discretised and not e.sample.discretised
    order = e.sample.order.replace("_", " ")
    return f"{e.framepack.packing}, {order}{sort}{', history as it is' if as_it_is else ''}"
  method = e.history
  sink = f", sink {method.sink}" if method.sink else ""
  return f"{method.order.replace('_', '-')}, {method.level} history{sink}"


if __name__ == "__main__":
  configs.run_flags(main)
