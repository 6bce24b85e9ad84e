"""Frozen dataclasses from groups of a config.

Every field is checked, and a typo is answered with the nearest name.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from ml_collections import config_dict

from hiar_jax.errors import UserError

T = TypeVar("T")


GROUP = Mapping | config_dict.ConfigDict


def nearest(name: str, names: Iterable[str]) -> str:
  """The end of an error line: the closest of the names that exist, or all of them if none is close
  and they are few.
  """
  names = sorted(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
  if close:
    return f"did you mean {close[0]!r}?"
  return f"there is {', '.join(names)}" if 0 < len(names) <= 12 else "no name is close to it"


def walk(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, Any]]:
  """All dotted keys with their values, groups included."""
  for key, value in tree.items():
    yield prefix + key, value
    if isinstance(value, GROUP):
      yield from walk(value, f"{prefix}{key}.")


def build(cls: type[T], config: GROUP, /, **extra: Any) -> T:
  """Makes a frozen dataclass from a group of a config, field by field, nested dataclasses too.

  Of several dataclasses that may stand in a field it is the one of the group's `kind`.

  Lists become tuples where the field is a tuple (a config read back from JSON has lists). `extra`
  gives fields that the config does not hold. Raises `UserError` for an unknown key, a missing
  field, or a value of another type.
  """
  return _build(cls, {**dict(config.items()), **extra}, cls.__name__)


def _build(cls: type[T], given: Mapping, name: str) -> T:
  hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}
  for key in given:
    if key not in fields:
      raise UserError(f"{name} has no field {key!r}; {nearest(key, fields)}")
  for key, field in fields.items():
    optional = (
      field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )
    if key not in given and not optional:
      raise UserError(
        f"{name} needs a field {key!r} ({_type_name(hints[key])}); the config gives "
        f"{', '.join(given)}"
      )
  values = {key: _convert(hints[key], value, f"{name}.{key}") for key, value in given.items()}
  try:
    return cls(**values)
  except UserError as error:
    group = name.partition(".")[2]  # which of the groups has, say, too small a batch
    raise UserError(str(error) if str(error).startswith(group) else f"{group}: {error}") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
  if isinstance(value, GROUP):
    nested = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
    if nested:
      return _build(_of_kind(nested, value, name), dict(value.items()), name)
  if isinstance(value, list) and any(
    get_origin(h) is tuple or h is tuple for h in (hint, *get_args(hint))
  ):
    value = _deep_tuple(value)
  # an int is a good float
  if not is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True)):
    raise UserError(f"{name}: expected {_type_name(hint)}, got {value!r}")
  return value


def _of_kind(classes: list[type], value: Mapping, name: str) -> type:
  """Of several dataclasses the one whose field `kind` defaults to the group's; the first where the
  group names none.
  """
  if len(classes) == 1 or "kind" not in value:
    return classes[0]
  kinds = {cls.kind: cls for cls in classes}
  if value["kind"] not in kinds:
    raise UserError(f"{name}.kind = {value['kind']!r}: {nearest(str(value['kind']), kinds)}")
  return kinds[value["kind"]]


def _deep_tuple(value: Any) -> Any:
  return tuple(_deep_tuple(item) for item in value) if isinstance(value, list) else value


def _type_name(hint: Any) -> str:
  return (
    hint.__name__
    if isinstance(hint, type) and not get_args(hint)
    else str(hint).replace("typing.", "")
  )
