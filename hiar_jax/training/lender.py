"""The run that another takes stages from: which workdir `stages_from` means (which stages:
training.lineage).
"""

import dataclasses
import os
import pathlib

from hiar_jax.config.workdir import RESOLVED, to_json
from hiar_jax.training.experiment import Experiment


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
