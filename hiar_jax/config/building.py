"""Frozen dataclasses from groups of a config, every field checked against its type."""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import numbers
import os
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from ml_collections import config_dict

from hiar_jax.errors import UserError
from hiar_jax.files import expanded

T = TypeVar("T")

GROUP = Mapping | config_dict.ConfigDict


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns the end of an error message: the closest of `names`, or all of at most 12."""
  names = sorted(names)
  # 0.6: difflib's own default
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
  if close:
    return f"did you mean {close[0]!r}?"
  return f"there is {', '.join(names)}" if 0 < len(names) <= 12 else "no name is close to it"


def walk(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, Any]]:
  """Yields all dotted keys with their values, groups included."""
  for key, value in tree.items():
    yield prefix + key, value
    if isinstance(value, GROUP):
      yield from walk(value, f"{prefix}{key}.")


def build(cls: type[T], config: GROUP, /, **extra: Any) -> T:
  """Builds a frozen dataclass from a group of a config, nested dataclasses included.

  For a field of several kinds (`of_kinds`) the group's `kind` decides. Lists become tuples where
  the field is a tuple: a config read back from JSON has lists. extra: fields that the config does
  not hold. Raises UserError for an unknown key, a missing field, or a value of another type.
  """
  return _build(cls, {**dict(config.items()), **extra}, cls.__name__)


def _build(cls: type[T], given: Mapping, name: str) -> T:
  """Builds `cls` from the values of a group; name: its dotted path, for messages."""
  hints = get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
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
  values = {}
  for key, value in given.items():
    kinds = fields[key].metadata.get("kinds")
    if fields[key].metadata.get("path") and isinstance(value, str):
      value = expanded(value)
    if kinds and isinstance(value, GROUP):
      values[key] = _build_kind(kinds, value, f"{name}.{key}")
    else:
      values[key] = _convert(hints[key], value, f"{name}.{key}")
  try:
    return cls(**values)
  except UserError as error:
    # __post_init__ names its own field alone; prefix the group, as in "teacher: batch = 0"
    group = name.partition(".")[2]
    raise UserError(str(error) if str(error).startswith(group) else f"{group}: {error}") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
  """Returns a value as a field of type `hint` takes it; raises UserError for another type."""
  if isinstance(value, GROUP):
    # the hint itself, or the members of a union such as Model | None
    nested = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
    if nested:
      return _build(nested[0], dict(value.items()), name)
  if isinstance(value, list) and any(
    get_origin(h) is tuple or h is tuple for h in (hint, *get_args(hint))
  ):
    value = _deep_tuple(value)
  if not _fits(value, hint):
    raise UserError(f"{name}: expected {_type_name(hint)}, got {value!r}")
  return value


def path_field(default: str = "") -> Any:
  """Returns a dataclass field that holds a path, in which `build` replaces a leading ~ by the home:
  shells leave it alone behind --flag=. A config that is stored keeps it.
  """
  return dataclasses.field(default=default, metadata={"path": True})


def _fits(value: Any, hint: Any) -> bool:
  # True is an int of Python, and no number of anybody's
  if isinstance(value, bool) and not {bool, object, Any} & {hint, *get_args(hint)}:
    return False
  # the numeric tower of PEP 484: an int may stand where a float is expected
  return is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))


def as_fields(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns arguments as the fields of a dataclass of that name take them: NumPy's whole numbers as
  int, paths as text. Raises UserError for one of another type.
  """
  hints, values = get_type_hints(cls), {}
  for name, value in given.items():
    if isinstance(value, os.PathLike):
      value = os.fspath(value)
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
      value = int(value)
    hint = hints.get(name, object)  # an unknown name is told elsewhere
    if not _fits(value, hint):
      raise UserError(f"{name} = {value!r}: expected {_type_name(hint)}")
    values[name] = value
  return values


def of_kinds(kinds: Mapping[str, type], **options: Any) -> Any:
  """Returns a dataclass field for a group whose `kind` picks its class from a registry.

  A group without `kind` is of the first. The class may have `kind` as a field or not. The registry
  is read when a config is built, so classes may be added to it. options: of dataclasses.field, as
  default.
  """
  return dataclasses.field(metadata={"kinds": kinds}, **options)


def _build_kind(kinds: Mapping[str, type], value: GROUP, name: str) -> Any:
  """Builds a group by the class that its `kind` names."""
  group = dict(value.items())
  kind = group.get("kind", next(iter(kinds)))
  if kind not in kinds:
    raise UserError(f"{name}.kind = {kind!r}: {nearest(str(kind), kinds)}")
  if all(field.name != "kind" for field in dataclasses.fields(kinds[kind])):
    group.pop("kind", None)
  return _build(kinds[kind], group, name)


def _deep_tuple(value: Any) -> Any:
  return tuple(_deep_tuple(item) for item in value) if isinstance(value, list) else value


def _type_name(hint: Any) -> str:
  if isinstance(hint, type) and not get_args(hint):
    return hint.__name__
  return str(hint).replace("typing.", "")
