"""The resolved config of a workdir: written when a run starts, compared when it goes on."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from hiar_jax.config.building import GROUP, walk
from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic

RESOLVED = "config.json"  # in every workdir: the config that made it, after overrides


def to_json(config: Any) -> Any:
  """A config (ConfigDict, dataclass or dict) as plain JSON values; tuples become lists."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    config = dataclasses.asdict(config)
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


def difference(stored: Any, given: Any) -> list[str]:
  """The fields in which two configs differ, as 'key: stored -> given'; '(none)' where a field is
  not there.
  """
  a, b = _flat(to_json(stored)), _flat(to_json(given))
  keys = [key for key in sorted(a | b) if a.get(key) != b.get(key)]
  return [f"{key}: {a.get(key, '(none)')} -> {b.get(key, '(none)')}" for key in keys]


def _flat(tree: Mapping) -> dict[str, str]:
  leaves = {key: value for key, value in walk(tree) if not isinstance(value, Mapping)}
  # 1 and 1.0, true and 1 differ as text
  return {key: json.dumps(value) for key, value in leaves.items()}


def save_resolved(config: Any, workdir: str | os.PathLike) -> None:
  """Writes `<workdir>/config.json` (atomically), creating the workdir."""
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  write_atomic(
    pathlib.Path(workdir) / RESOLVED, (json.dumps(to_json(config), indent=2) + "\n").encode()
  )


def read_resolved(workdir: str | os.PathLike) -> dict | None:
  """The config that a workdir was made with, or None if it holds none."""
  path = pathlib.Path(workdir) / RESOLVED
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path} is not JSON ({error}); restore it, or use another --workdir"
    ) from error


def check_workdir(
  config: Any, workdir: str | os.PathLike, ignore: tuple[str, ...] = ("log",)
) -> None:
  """Raises `UserError` if the workdir belongs to another config, naming the fields (keys of
  `ignore` may differ).
  """
  stored = read_resolved(workdir)
  if stored is None:
    return
  ignored = tuple(f"{key}{end}" for key in ignore for end in (".", ":"))
  differing = [line for line in difference(stored, config) if not line.startswith(ignored)]
  if differing:
    raise UserError(
      f"--workdir={os.fspath(workdir)} belongs to another config (stored -> given: "
      f"{'; '.join(differing)}); "
      "use another --workdir, or the stored values"
    )
