"""The fields that a config file leaves out, so that a command can set them too.

A config's groups are built into dataclasses (config.building), whose fields may have defaults that
no file repeats. `add` puts them into a config before overrides are parsed, typed as the dataclass
annotates them; `drop` takes out again what no override has changed.
"""

from collections.abc import Collection, Iterator
import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints

from ml_collections import config_dict


def add(config: config_dict.ConfigDict, cls: type) -> list[str]:
  """Adds the fields that a config lacks of the class that it is built into, nested groups included.

  Each has its default as value, or None. A group without default is not added. Of a group of
  several kinds (building.of_kinds) it adds the fields of all kinds: which one is meant may be said
  by an override. Returns the dotted keys that were added, groups before what is in them.
  """
  with config.unlocked():
    return list(_add(config, (cls,), ""))


def _add(group: config_dict.ConfigDict, classes: tuple[type, ...], prefix: str) -> Iterator[str]:
  for cls in classes:
    for name, (field, hint) in _fields(cls).items():
      default = None if field.default is dataclasses.MISSING else field.default
      inner = _classes(field, hint, group.get(name))
      if not inner and name not in group:
        group[name] = config_dict.FieldReference(default, field_type=_plain_type(hint, default))
        yield prefix + name
      if inner and name not in group and dataclasses.is_dataclass(default):
        group[name] = config_dict.ConfigDict()
        yield prefix + name
      if inner and isinstance(group.get(name), config_dict.ConfigDict):
        kinds = field.metadata.get("kinds")
        if kinds and "kind" not in group[name]:
          group[name].kind = next(iter(kinds))
          yield f"{prefix}{name}.kind"
        yield from _add(group[name], inner, f"{prefix}{name}.")


def drop(
  config: config_dict.ConfigDict, cls: type, added: Collection[str], changed: Collection[str]
) -> None:
  """Removes the `added` keys, but for those of `changed` whose value is not the default.

  So a config where nothing is set stays as its file has it.
  """
  with config.unlocked():
    for key in reversed(added):  # a group comes after what is in it
      *groups, name = key.split(".")
      group, owner, kinds = config, cls, {}
      for step in groups:
        field, hint = _fields(owner)[step]
        group, kinds = group[step], field.metadata.get("kinds", {})
        owner = _classes(field, hint, group)[0]
      value = group[name]
      if isinstance(value, config_dict.ConfigDict):
        kept = len(value) > 0
      elif name == "kind" and kinds:
        kept = key in changed and value != next(iter(kinds))
      else:
        # what another kind has is kept where it was set: building names it
        field, _ = _fields(owner).get(name, (None, None))
        kept = key in changed and (field is None or value != field.default)
      if not kept:
        del group[name]


def without_default(config: config_dict.ConfigDict, cls: type, key: str) -> str | None:
  """Returns the group of a dotted key that neither the config nor its class' default gives, so that
  nothing in it can be set; None where there is no such group.
  """
  group: Any = config
  *steps, _ = key.split(".")
  for i, step in enumerate(steps):
    field, hint = _fields(cls).get(step, (None, None))
    inner = field and _classes(field, hint, group.get(step))
    if not inner:
      return None
    if group.get(step) is None:
      return ".".join(steps[: i + 1])
    group, cls = group[step], inner[0]
  return None


def _fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any]]:
  """Returns the fields that a group may hold, with their types."""
  hints = get_type_hints(cls)
  return {field.name: (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _classes(field: dataclasses.Field, hint: Any, group: Any) -> tuple[type, ...]:
  """Returns the classes that a group may be built into, the one that it names first; () of a plain
  field.
  """
  kinds = field.metadata.get("kinds")
  if kinds:
    kind = group.get("kind") if isinstance(group, config_dict.ConfigDict) else None
    named = [kinds[kind]] if kind in kinds else []
    return (*named, *(cls for cls in kinds.values() if cls not in named))
  return tuple(h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h))


def _plain_type(hint: Any, default: Any) -> type:
  """Returns the type of which a command's text is read: of a union without None object, any
  literal.
  """
  found = get_origin(hint) or hint
  if found is types.UnionType:
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return object if len(kinds) > 1 else _plain_type(kinds[0], default)
  if isinstance(found, type) and found in (bool, int, float, str, tuple):
    return found
  return type(default) if default is not None else str
