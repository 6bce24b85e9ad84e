"""What a run's stages depend on: so which of them may be another run's (stages_from), what of a
config may still be changed in a workdir, and how a stage is trained longer (--extend).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
import pathlib
import shutil
import sys
from typing import Any

from hiar_jax.checkpoints.on_disk import CHECKPOINTS
from hiar_jax.config.building import build
from hiar_jax.config.workdir import RESOLVED, difference, read_resolved, to_json
from hiar_jax.errors import UserError
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.places import agreed, located

# The groups that may differ between a workdir's config and the one given: they change no number.
FREE_GROUPS = ("log", "sample", "mesh", "stages_from")
# A stage -> the groups and fields that it is the first to depend on; each stage depends on those
# before it too. A field that is in no line is taken to be the data's.
DEPENDS = {
  "data": ("data", "codec", "text"),
  "teacher": ("seed", "model", "teacher", "weights.base"),
  "trajectories": ("student", "trajectories"),
  "causal_init": ("causal_init", "history", "weights.student"),
  "codebook": ("framepack",),
  "framepack": (),
  # no gradient reaches the past in causal init
  "distill": ("distill", "history.gradient", "teacher_model", "weights.teacher"),
}
BORROWED = ("data", "teacher", "trajectories", "causal_init")
# What of a trained stage may change at one of its checkpoints: its state stays what it is.
EXTENDABLE = (
  "steps",
  "lr",
  "muon_lr",
  "critic_lr",
  "schedule",
  "warmup",
  "clip",
  "weight_decay",
  "ema_decay",
)


def first_stage(key: str) -> str:
  """Returns the first stage that depends on a config's field, by its dotted key."""
  found, longest = "data", ""
  for stage, names in DEPENDS.items():
    for name in names:
      if f"{key}.".startswith(f"{name}.") and len(name) > len(longest):
        found, longest = stage, name
  return found


def is_made(workdir: pathlib.Path, stage: str) -> bool:
  """Returns True where a workdir holds anything of a stage."""
  return any(path.is_file() for path in (workdir / stage).rglob("*"))


# ------------------------------------------------------------------------------------- stages_from


@dataclasses.dataclass(frozen=True)
class Borrowed:
  """The stages that a run takes from stages_from; lines: in what the next one differs.

  lender: the experiment of that run; theirs: the stages that it has from another one itself.
  """

  stages: tuple[str, ...] = ()
  lines: tuple[str, ...] = ()
  lender: Experiment | None = None
  theirs: "Borrowed | None" = None

  def notes(self, source: str) -> list[str]:
    """Returns what is to be said of them, a line each: nothing where all are taken."""
    if not self.lines:
      return []
    return [
      f"stages_from = {source!r}: {', '.join(self.stages)} from there; what comes after is made "
      f"here (stored -> given: {'; '.join(self.lines)})"
    ]


def borrowed(
  e: Experiment, workdir: str | os.PathLike, borrowers: tuple[str, ...] = ()
) -> Borrowed:
  """Returns the stages of stages_from up to the first that depends on a field that differs.

  borrowers: the workdirs through which this one was come to. Raises UserError where no stage is the
  same, where one was taken from there that no longer is, or where runs take stages in a circle.
  """
  if not e.stages_from:
    return Borrowed()
  stored, workdir = read_resolved(e.stages_from), pathlib.Path(workdir)
  if stored is None:
    raise UserError(
      f"stages_from = {e.stages_from!r} holds no run; give a workdir that went through causal_init"
    )
  lender = _experiment(located(stored, e.stages_from, typed=False), e.stages_from)
  borrowers = (*borrowers, os.path.realpath(workdir))
  if os.path.realpath(e.stages_from) in borrowers:
    raise UserError(
      f"stages_from = {e.stages_from!r} takes its own stages from {workdir}, round in a circle; "
      "give the run that made them"
    )
  stages, lines = _same(e, workdir, lender)
  return Borrowed(stages, lines, lender, _behind(lender, e.stages_from, stages, borrowers))


def _behind(
  e: Experiment, workdir: str, stages: Sequence[str], borrowers: tuple[str, ...]
) -> Borrowed:
  """Returns what of the stages a lender has from another run itself: those that lie not there."""
  absent = [stage for stage in stages if not is_made(pathlib.Path(workdir), stage)]
  if not absent:
    return Borrowed()
  try:
    found = borrowed(e, workdir, borrowers)
  except UserError as error:
    raise UserError(f"stages_from = {workdir!r} takes stages of another run: {error}") from error
  kept = tuple(stage for stage in found.stages if stage in absent)
  return dataclasses.replace(found, stages=kept)


def place_of(
  e: Experiment, workdir: str | os.PathLike, taken: Borrowed, stage: str
) -> pathlib.Path:
  """Returns the directory of a stage's result: the workdir's, or that of the run that made it."""
  if stage in taken.stages:
    return place_of(taken.lender, e.stages_from, taken.theirs, stage)
  return pathlib.Path(workdir) / stage


def _same(
  e: Experiment, workdir: pathlib.Path, lender: Experiment
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the stages that are the same in both, and the lines in which the next one differs."""
  taken: list[str] = []
  theirs = agreed(lender, e.stages_from, e, workdir)
  renamed = functools.partial(e.data.opened.renamed, pathlib.Path(e.stages_from) / "data")
  lines = _unlike(theirs, to_json(e), (*FREE_GROUPS, *e.free_fields), renamed)
  replaced = {"teacher": e.weights.base, "causal_init": e.weights.student}
  order = BORROWED[: 2 if e.framepack else None]
  for stage in order:
    differs = [line for line in lines if first_stage(line.split(":")[0]) == stage]
    if stage == "causal_init":
      differs = _of_causal_init(e, lender, differs)
    later = [*order[len(taken) + 1 :], e.last_stage]
    here = (workdir / stage).exists() or replaced.get(stage)
    was_taken = not here and any((workdir / x).exists() for x in later)
    # earlier versions took the causal init of another past; such a distillation goes on so
    past = all(line.startswith("history.") for line in differs)
    if differs and (not taken or (was_taken and not past)):
      raise UserError(
        f"stages_from = {e.stages_from!r} was made with another config (stored -> given: "
        f"{'; '.join(differs)}); use the stored values, or leave stages_from empty"
      )
    if differs and not was_taken:
      return tuple(taken), tuple(differs)
    taken.append(stage)
  return tuple(taken), ()


def _of_causal_init(e: Experiment, theirs: Experiment, lines: list[str]) -> list[str]:
  """Returns the lines that matter to causal init: of the history its block, which cuts the clips,
  and where it is shown, all; no other run's student has the projections of a packed past.
  """
  shown = e.causal_init.shows == "history" or e.stored_student != e.dit
  kept = [line for line in lines if shown or not line.startswith("history.") or ".block:" in line]
  if e.stored_student != e.dit and not kept:
    return [f"history.packing = {e.history.packing!r}: projections of its own"]
  return kept


def _experiment(stored: dict, source: str) -> Experiment:
  try:
    return build(Experiment, stored)
  except UserError as error:
    raise UserError(
      f"stages_from = {source!r} was made with another config, that is none here: {error}"
    ) from error


# -------------------------------------------------------------------------------- another config


@dataclasses.dataclass(frozen=True)
class Change:
  """The fields in which a config differs from its workdir's. until: the stage and step from which
  it is trained on with them, as distill-200; '' where no stage that depends on them has begun.
  sampled: fields of `sample` in which it differs where the samples are made already.
  """

  lines: tuple[str, ...]
  until: str = ""
  sampled: tuple[str, ...] = ()

  @property
  def keeps_samples(self) -> bool:
    """True where samples stay that were made with other fields."""
    return bool(self.sampled) and not self.until

  def notes(self, workdir: pathlib.Path) -> list[str]:
    """Returns what is to be said of them, a line each."""
    found = []
    if self.lines:
      after = f" after {self.until}" if self.until else ""
      said = f"{workdir} goes on{after} with another config (before -> now): "
      found.append(said + "; ".join(self.lines))
    if self.keeps_samples:
      found.append(
        f"note: the samples are there, as they were made before ({'; '.join(self.sampled)}); "
        f"remove {workdir / 'sample'} to make others"
      )
    return found

  def begin(self, workdir: pathlib.Path) -> None:
    """Keeps what describes a run until it is trained on: its config, and the samples of its
    weights.
    """
    if self.until:
      kept = [workdir / f"config.{self.until}.json", workdir / f"sample.{self.until}"]
      shutil.copyfile(workdir / RESOLVED, kept[0])
      if (workdir / "sample").exists():
        (workdir / "sample").rename(kept[1])
      there = ", ".join(str(path) for path in kept if path.exists())
      print(f"kept of before: {there}", file=sys.stderr)


def change(
  config: Any,
  workdir: str | os.PathLike,
  ignore: Sequence[str],
  *,
  renamed: Callable[[], Sequence[str]] = tuple,
  extend: bool = False,
  typed: bool = True,
) -> Change:
  """Returns in what a config differs from its workdir's.

  ignore: as in workdir.difference. renamed: returns fields that name the same data otherwise.
  extend: the stage that was trained last may be trained on with other values of EXTENDABLE. typed:
  as in places.located. Raises UserError where a stage that has begun depends on a field.
  """
  stored = read_resolved(workdir)
  stored = None if stored is None else agreed(stored, workdir, config, workdir, typed)
  lines = [] if stored is None else _unlike(stored, config, tuple(ignore), renamed)
  made = [stage for stage in DEPENDS if is_made(pathlib.Path(workdir), stage)]
  order, until = list(DEPENDS), ""
  late = [
    line
    for line in lines
    if any(order.index(first_stage(line.split(":")[0])) <= order.index(stage) for stage in made)
  ]
  if late and extend:
    until = _extended(config, pathlib.Path(workdir), late, made[-1])
  elif late:
    stage = made[-1]
    hint = f"; --extend trains {stage} on from its checkpoint" * _is_extension(late, stage)
    raise UserError(
      f"--workdir={os.fspath(workdir)} belongs to another config (stored -> given: "
      f"{'; '.join(late)}); use another --workdir, or the stored values{hint}"
    )
  sampled = []
  if stored is not None and (pathlib.Path(workdir) / "sample" / "metrics.json").exists():
    every = difference(stored, config)
    sampled = [line for line in every if line.startswith("sample.")]
  return Change(tuple(lines), until, tuple(sampled))


def _unlike(
  stored: Any, given: Any, ignore: tuple[str, ...], renamed: Callable[[], Sequence[str]]
) -> list[str]:
  """Returns workdir.difference without fields that name the same data otherwise. They are asked for
  only where fields of the data differ: that reads the names of all films.
  """
  lines = difference(stored, given, ignore)
  same = renamed() if any(line.startswith("data.") for line in lines) else ()
  return [line for line in lines if line.split(":")[0] not in same]


def _is_extension(lines: list[str], stage: str) -> bool:
  fields = {f"{stage}.{field}" for field in EXTENDABLE}
  return all(line.split(":")[0] in fields for line in lines)


def _extended(config: Any, workdir: pathlib.Path, lines: list[str], stage: str) -> str:
  """Returns the stage and the step from which it is trained on, as distill-200. Raises UserError
  where it cannot be with this config.
  """
  if not _is_extension(lines, stage):
    raise UserError(
      f"--extend: {'; '.join(lines)}: at a checkpoint of {stage}, the last stage that was trained, "
      f"only {', '.join(EXTENDABLE)} of it may change"
    )
  names = [path.name for path in (workdir / stage / CHECKPOINTS).glob("*")]
  step = max((int(name) for name in names if name.isdigit()), default=0)
  steps = config[stage]["steps"]
  if step >= steps:
    raise UserError(
      f"--extend: {stage} is at step {step}; give --config.{stage}.steps of more than {step}"
    )
  return f"{stage}-{step}"
