"""From the command line to frozen dataclasses: entry points, overrides, the workdir's resolved
config.

`--config=experiments/x.py:variant` names a Python file with `get_config(variant)`;
`--config.distill.lr=1e-4` overrides a field. What a person can get wrong here ends as one line on
stderr and exit status 2.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import errno
import json
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any, TypeVar, get_args, get_origin, get_type_hints
import warnings

from absl import app, flags, logging
from beartype import BeartypeConf
from beartype.door import is_bearable
from ml_collections import config_dict, config_flags

from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic

T = TypeVar("T")

GROUP = Mapping | config_dict.ConfigDict
RESOLVED = "config.json"  # in every workdir: the config that made it, after overrides


# ------------------------------------------------------------------------------------- entry points


def run(main: Callable[[config_dict.ConfigDict, str], Any]) -> None:
  """Entry point of a job: calls main(config, workdir) with what `--config=FILE[:VARIANT]` and
  `--workdir=DIR` say.

  Bad input (a `UserError` from anywhere below) is one line on stderr and exit status 2; a bug keeps
  its traceback.
  """
  config_flags.DEFINE_config_file(
    "config", None, "a Python file with get_config(), and a variant", lock_config=True
  )
  flags.DEFINE_string("workdir", None, "directory of this run; the same command continues it")

  def call() -> None:
    if flags.FLAGS.config is None:
      raise UserError("--config is missing; give a config file, as --config=experiments/shapes.py")
    if not flags.FLAGS.workdir:
      raise UserError("--workdir is missing; give the run a directory, as --workdir=runs/shapes")
    main(flags.FLAGS.config, flags.FLAGS.workdir)

  run_flags(call)


def run_flags(main: Callable[[], Any]) -> None:
  """Entry point of a tool with its own absl flags: parses them and calls main(), with the same care
  for bad input.
  """

  def guarded(argv: list[str]) -> None:
    del argv
    try:
      main()
    except UserError as error:
      _fail(error)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      where = f" of {error.filename}" if error.filename else ""
      _fail(
        UserError(f"no space left on the disk{where}; free some space and run the same command")
      )
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(130)

  use_huge_pages()
  app.run(guarded, flags_parser=_parse)


def use_huge_pages() -> None:
  """Starts this process once more, if need be, with glibc's huge pages.

  XLA allocates a step's temporary memory anew for every step; on a CPU, with small pages, a fifth
  of the time goes into touching them. The allocator reads its settings when a process starts, so
  they cannot be changed later. Does nothing where the user has set GLIBC_TUNABLES, outside Linux,
  or where this is not the module of `python -m`.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and "-m" in sys.orig_argv:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(error: UserError) -> None:
  print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; exits with one line where absl and ml_collections would show usage or a
  traceback.
  """
  try:
    try:
      with warnings.catch_warnings():
        # ml_collections reads config files by a method that importlib deprecates.
        warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
        rest = flags.FLAGS(argv)
    except (AttributeError, LookupError, OSError, TypeError, ValueError, flags.Error) as error:
      raise _explain(argv, error) from error
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      # ml_collections hides a file that cannot be read until the first access.
      if not isinstance(flags.FLAGS.config, config_dict.ConfigDict):
        raise _explain(argv, None)
    if flags.FLAGS["verbosity"].using_default_value:
      # else app.run sets INFO: a screenful of Orbax's notes for each save
      flags.FLAGS.verbosity = logging.WARNING
    return rest
  except UserError as error:
    _fail(error)


# ---------------------------------------------------------------------- what was wrong, in one line


def nearest(name: str, names: Iterable[str]) -> str:
  """The end of an error line: the closest of the names that exist, or all of them if none is close
  and they are few.
  """
  names = sorted(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
  if close:
    return f"did you mean {close[0]!r}?"
  return f"there is {', '.join(names)}" if 0 < len(names) <= 12 else "no name is close to it"


def _explain(argv: list[str], error: Exception | None) -> UserError:
  """Finds out which part of the command line was wrong: the file, its variant, a key, a value or
  another flag.
  """
  spec, overrides = _config_arguments(argv)
  if spec is not None:
    config = _load(spec)
    names = dict(_walk(config))
    for key, text in overrides:
      if key.split("[")[0] not in names:
        return UserError(
          f"--config.{key}: the config {spec} has no such key; {nearest(key, names)}"
        )
      if isinstance(error, flags.IllegalFlagValueError) and f"config.{key}={text}" in str(error):
        return UserError(f"--config.{key}={text}: expected {_kind(config, key)}")
  elif overrides:
    return UserError(
      f"--config.{overrides[0][0]} overrides a config, but --config is missing or comes after it"
    )
  return UserError(str(error).replace("FATAL Flags parsing error:", "").strip())


def _kind(config: config_dict.ConfigDict, key: str) -> str:
  """What may stand in a field: its type and present value, or that it is a group."""
  *groups, name = key.split(".")
  for group in groups:
    config = config[group]
  if isinstance(config[name], config_dict.ConfigDict):
    return f"no value: it is a group, of {', '.join(config[name])}"
  kind = config.get_type(name).__name__  # a placeholder has a type before it has a value
  return kind if config[name] is None else f"{kind}, as {config[name]!r}"


def _config_arguments(argv: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
  """-> the value of --config and the overrides [(key, text)], both in the forms --a=b and --a b."""
  spec, overrides = None, []
  for i, argument in enumerate(argv):
    match = re.match(r"^--?(no)?config(?:\.([^=]+))?(?:=(.*))?$", argument, re.DOTALL)
    if match:
      text = match[3] if match[3] is not None else (argv[i + 1] if i + 1 < len(argv) else "")
      if match[2] is None:
        spec = text
      else:
        overrides.append((match[2], text))
  return spec, overrides


def _load(spec: str) -> config_dict.ConfigDict:
  """The config of a spec FILE[:VARIANT], or a `UserError` that says where its file fails."""
  name, _, variant = spec.partition(":")
  if not os.path.isfile(name):
    there = [str(path) for path in pathlib.Path(os.path.dirname(name)).glob("*.py")]
    raise UserError(f"--config={spec}: there is no file {name!r}; {nearest(name, there)}")
  try:
    config = runpy.run_path(name)["get_config"](*([variant] if ":" in spec else []))
  except UserError:
    raise
  except Exception as error:  # the user's own file: name the line, whatever went wrong in it
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    table = frame.f_globals.get("VARIANTS", ())
    if isinstance(error, KeyError) and error.args == (variant,) and table:
      raise UserError(
        f"--config={spec}: there is no variant {variant!r}; {nearest(variant, table)}"
      ) from error
    lines = [
      frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name
    ]
    where = f"{name}:{lines[-1]}" if lines else name
    text = str(error.args[0] if error.args else "")
    if "\\n" in text:  # ml_collections' own advice comes quoted, in one KeyError after another
      text = text.replace("\\'", "").replace("\\n", "; ").strip("'")
    raise UserError(f"--config={spec}: {where}: {type(error).__name__}: {text}") from error
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f"--config={spec}: get_config() returned {type(config).__name__}, expected a ConfigDict"
    )
  return config


def _walk(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, Any]]:
  """All dotted keys with their values, groups included."""
  for key, value in tree.items():
    yield prefix + key, value
    if isinstance(value, GROUP):
      yield from _walk(value, f"{prefix}{key}.")


# ---------------------------------------------------------------------------- config -> dataclasses


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


# ------------------------------------------------------------------------------ the resolved config


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
  leaves = {key: value for key, value in _walk(tree) if not isinstance(value, Mapping)}
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
