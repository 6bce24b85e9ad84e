"""Stages of another run: which workdir `stages_from` means, and what of it may be taken."""

import dataclasses
import os
import pathlib

from hiar_jax.config.building import build
from hiar_jax.config.workdir import RESOLVED, difference, read_resolved, to_json
from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.training.experiment import Experiment

# The groups that the stages from data to causal_init depend on: those of stages_from must agree.
SHARED_GROUPS = (
  "seed",
  "data",
  "codec",
  "text",
  "model",
  "student",
  "teacher",
  "trajectories",
  "causal_init",
  "weights",
)


def found_from(workdir: str | os.PathLike, stages_from: str) -> str:
  """Returns the path of the run that a workdir's stored `stages_from` means, as given where there
  is none.

  It is stored relative to the workdir, so that both may be moved, and used from any folder. Earlier
  versions stored what was typed in the folder of the command, most often one above the workdir.
  """
  own = pathlib.Path(os.path.abspath(workdir))
  for folder in (own, *own.parents):
    # by its name, not by the links in it: what was typed led there by its name
    place = os.path.normpath(folder / stages_from)
    if place != str(own) and os.path.isfile(os.path.join(place, RESOLVED)):
      return place
  return stages_from


def located(experiment: Experiment, workdir: str | os.PathLike, typed: bool) -> Experiment:
  """Returns the experiment with the path of the run that it borrows from.

  typed: True where `stages_from` was given in a command, in whose folder it is looked for first.
  """
  given = experiment.stages_from
  if not given or (typed and os.path.isfile(os.path.join(given, RESOLVED))):
    return experiment
  return dataclasses.replace(experiment, stages_from=found_from(workdir, given))


def as_stored(config, experiment: Experiment, workdir: str | os.PathLike) -> dict:
  """Returns a config as a workdir keeps it, with `stages_from` relative to it; an absolute path
  stays.
  """
  stored, place = to_json(config), experiment.stages_from
  if place and not os.path.isabs(os.path.expanduser(stored["stages_from"])):
    stored["stages_from"] = os.path.relpath(place, workdir)
  return stored


def sees_another_past(experiment: Experiment, workdir: pathlib.Path) -> bool:
  """True where causal init learns to read the past of this method, and that of stages_from reads
  another. Earlier versions took it all the same: a distillation that began so goes on so.
  """
  e = experiment
  if not e.stages_from or e.causal_init.shows != "history":
    return False
  if (workdir / "distill").exists() and not (workdir / "causal_init").exists():
    return False
  stored = read_resolved(e.stages_from) or {}
  theirs = build(MethodConfig, stored["history"]) if "history" in stored else e.history
  # it does not matter to causal init, in which no gradient reaches the past
  return dataclasses.replace(theirs, gradient=e.history.gradient) != e.history


def check_shared(config, experiment: Experiment) -> None:
  """Raises UserError where stages_from was made with another config in SHARED_GROUPS."""
  stored = read_resolved(experiment.stages_from)
  if stored is None:
    raise UserError(
      f"stages_from = {experiment.stages_from!r} holds no run; give a workdir that went through "
      "causal_init"
    )

  def shared(tree: dict) -> dict:
    # of the history only the block must agree, since it cuts the clips; whose causal init is taken,
    # Run.borrows says
    block = tree.get("history", {}).get("block")
    return {**{name: tree.get(name) for name in SHARED_GROUPS}, "history": {"block": block}}

  lines = difference(shared(stored), shared(to_json(config)), experiment.free_fields)
  if lines:
    raise UserError(
      f"stages_from = {experiment.stages_from!r} was made with another config (stored -> given: "
      f"{'; '.join(lines)}); use the stored values, or leave stages_from empty"
    )
