"""The resolved config of a workdir: written when a run starts, compared when it continues."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from hiar_jax.config.building import GROUP, walk
from hiar_jax.errors import UserError
from hiar_jax.files import check_name, read_object, write_atomic

RESOLVED = "config.json"  # in every workdir: the config that made it, after overrides


def to_json(config: Any) -> Any:
  """Converts a config (ConfigDict, dataclass or dict) to plain JSON values; tuples become lists.

  A dataclass' field with `since` in its metadata is left out while it has its default: files of
  versions before that one lack it, and mean the default. Raises UserError for values that JSON does
  not hold.
  """
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    config = {
      field.name: value
      for field, value in values.items()
      if "since" not in field.metadata or value != field.default
    }
  if isinstance(config, GROUP):
    return {str(key): to_json(value) for key, value in config.items()}
  if isinstance(config, tuple | list):
    return [to_json(value) for value in config]
  if config is None or isinstance(config, bool | int | float | str):
    return config
  kind = type(config).__name__
  raise UserError(
    f"a config holds numbers, strings, booleans, tuples and groups; got {kind}: {config!r}"
  )


def difference(stored: Any, given: Any, ignore: tuple[str, ...] = ()) -> list[str]:
  """Returns the fields in which two configs differ, as 'key: stored -> given'.

  '(none)' stands for a field that one of them does not have. ignore: groups, fields at the top and
  fields of groups ("model.remat") that may differ.
  """

  def flat(config: Any) -> dict[str, str]:
    leaves = walk(to_json(config))
    # compared as JSON text: in Python 1 == 1.0 == True
    return {key: json.dumps(value) for key, value in leaves if not isinstance(value, Mapping)}

  old, new = flat(stored), flat(given)
  keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
  return [
    f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}"
    for key in keys
    if not any(f"{key}.".startswith(f"{free}.") for free in ignore)
  ]


def save_resolved(config: Any, workdir: str | os.PathLike) -> None:
  """Writes `<workdir>/config.json` (atomically), creating the workdir."""
  text = json.dumps(to_json(config), indent=2) + "\n"
  write_atomic(pathlib.Path(workdir) / RESOLVED, text.encode())


def read_resolved(workdir: str | os.PathLike) -> dict | None:
  """Reads the config that a workdir was made with; None if it holds none.

  Raises Damaged where the file is no object of JSON, UserError as files.check_name.
  """
  check_name(workdir, os.fspath(workdir))
  path = pathlib.Path(workdir) / RESOLVED
  if not os.path.isfile(path):  # False for names that no folder has too
    return None
  return read_object(path, "restore it, or use another --workdir")
