"""Places outside of a workdir that its config names: the run that it takes stages from (which of
them: training.lineage), converted weights, films, prompts and their embeddings.

Relative paths are stored relative to the workdir, so that both may be moved, and used from any
folder. Earlier versions stored what was typed in the folder of the command, most often one above
the workdir.
"""

from collections.abc import Callable, Iterator, Mapping
import os
from typing import Any

from hiar_jax.config.workdir import RESOLVED, to_json
from hiar_jax.data.tfds_builder import read_recipe


def _holds_run(place: str) -> bool:
  return os.path.isfile(os.path.join(place, RESOLVED))


def _holds_files(place: str) -> bool:
  """True for a folder of films or pairs, False for what a stage has made of one: a workdir has
  `data` and `trajectories` of its own.
  """
  return os.path.isdir(place) and read_recipe(place) is None


# A field of a config -> whether a place holds what it means.
FIELDS: Mapping[str, Callable[[str], bool]] = {
  "stages_from": _holds_run,
  **dict.fromkeys(("weights.base", "weights.teacher", "weights.student"), os.path.isdir),
  **dict.fromkeys(("codec.weights", "text.weights", "text.cache"), os.path.isdir),
  **dict.fromkeys(("data.folder", "trajectories.pairs"), _holds_files),
  **dict.fromkeys(("data.prompts", "sample.prompts"), os.path.isfile),
}
NO_PATHS = {"sample.prompts": "held_out"}  # what a field holds where it names no place


def located(config: Any, workdir: str | os.PathLike, typed: bool) -> dict:
  """Returns a config as JSON values with the places that its paths lead to: as given where there is
  nothing.

  typed: True where it was given in a command, in whose folder they are looked for first.
  """
  found = to_json(config)
  for field, group, name in _paths(found):
    group[name] = _found(field, group[name], workdir, typed) or group[name]
  return found


def as_stored(config: Any, workdir: str | os.PathLike, before: Mapping | None) -> dict:
  """Returns a config that was typed as a workdir keeps it, with relative paths relative to it; an
  absolute path and one of a home stay, and so does what led to the same place before.
  """
  stored = to_json(config)
  old = {field: group[name] for field, group, name in _paths(to_json(before or {}))}
  for field, group, name in _paths(stored):
    given = group[name]
    if not os.path.isabs(os.path.expanduser(given)):
      place = os.path.abspath(_found(field, given, workdir, True) or given)
      led = field in old and _found(field, old[field], workdir, False)
      kept = led and os.path.abspath(led) == place
      group[name] = old[field] if kept else os.path.relpath(place, workdir)
  return stored


def agreed(
  stored: Any, source: str | os.PathLike, given: Any, workdir: str | os.PathLike, typed: bool = True
) -> dict:
  """Returns the config that `source` stores, to be compared with that of a workdir: its paths as
  given there where both lead to one place, else the places that they lead to.
  """
  found = to_json(stored)
  texts = {field: group[name] for field, group, name in _paths(to_json(given))}
  for field, group, name in _paths(found):
    there = _candidates(field, group[name], source, False)
    text = texts.get(field, "")
    if text and there & _candidates(field, text, workdir, typed):
      group[name] = text
    elif len(there) == 1:  # there is something
      (group[name],) = there
  return found


def lost(config: Any, workdir: str | os.PathLike) -> set[str]:
  """Returns the fields of a stored config at whose places there is nothing."""
  paths = _paths(to_json(config))
  return {field for field, group, name in paths if not _found(field, group[name], workdir, False)}


def _paths(config: dict) -> Iterator[tuple[str, dict, str]]:
  """Yields (field, its group, its name there) of the paths that a config gives."""
  for field in FIELDS:
    *groups, name = field.split(".")
    group = config
    for key in groups:
      group = group.get(key) if isinstance(group, dict) else None
    given = group.get(name) if isinstance(group, dict) else None
    if isinstance(given, str) and given not in ("", NO_PATHS.get(field)):
      yield field, group, name


def _found(field: str, given: str, workdir: str | os.PathLike, typed: bool) -> str | None:
  """Returns the place that a path leads to; None where there is nothing."""
  holds, given = FIELDS[field], os.path.expanduser(given)
  if os.path.isabs(given):
    return given if holds(given) else None
  if typed and holds(given):
    return given
  own = os.path.abspath(workdir)
  folder = own
  while True:
    # by its name, not by the links in it: what was typed led there by its name
    place = os.path.normpath(os.path.join(folder, given))
    if place != own and holds(place):
      return place
    if folder == os.path.dirname(folder):
      return None
    folder = os.path.dirname(folder)


def _candidates(field: str, given: str, workdir: str | os.PathLike, typed: bool) -> set[str]:
  """Returns the place that a path leads to, or where there is nothing those that it may mean."""
  place = _found(field, given, workdir, typed)
  if place:
    return {os.path.abspath(place)}
  given = os.path.expanduser(given)
  return {os.path.abspath(given), os.path.abspath(os.path.join(workdir, given))}
