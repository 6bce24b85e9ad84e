"""The command line: entry points, config files with overrides, and renamed flags.

`--config=experiments/x.py:variant` names a Python file with `get_config(variant)`;
`--config.distill.lr=1e-4` overrides a field. Wrong input ends as one line on stderr and exit
status 2.
"""

from collections.abc import Callable, Mapping
import difflib
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from hiar_jax.config import left_out
from hiar_jax.config.building import nearest, walk
from hiar_jax.errors import UserError
from hiar_jax.files import DiskFull, expanded, is_disk_full

# Earlier names of a tool's flags -> their present names, or (name, {earlier value: present value}).
Renamed = Mapping[str, str | tuple[str, Mapping[str, str]]]


_COMMAS = flags.CsvListSerializer(",")

# ------------------------------------------------------------------------------------- entry points


def run(main: Callable[[config_dict.ConfigDict, str], Any], cls: type | None = None) -> None:
  """Runs a job: calls main(config, workdir) with `--config=FILE[:VARIANT]` and `--workdir=DIR`.

  cls: see define_config. A UserError from anywhere below is one line on stderr and exit status 2; a
  bug keeps its traceback.
  """
  define_config(
    "config file with get_config(), and its variant, as experiments/shapes.py:full; "
    "--config.KEY=VALUE overrides a number",
    cls,
  )
  define_path("workdir", None, "directory of this run; the same command continues it")

  def call_main() -> None:
    if flags.FLAGS.config is None:
      raise UserError("--config is missing; give a config file, as --config=experiments/shapes.py")
    if not flags.FLAGS.workdir:
      raise UserError("--workdir is missing; give the run a directory, as --workdir=runs/shapes")
    main(flags.FLAGS.config, flags.FLAGS.workdir)

  run_flags(call_main)


class _PathParser(flags.ArgumentParser):
  """Replaces a leading ~ by the home, and refuses names that no file can have (files.expanded)."""

  def parse(self, argument: str) -> str:
    return expanded(argument)


class _PathsParser(flags.ListParser):
  """The same, for each of several paths."""

  def parse(self, argument: str | list[str]) -> list[str]:
    return [expanded(path) for path in super().parse(argument)]


def define_paths(name: str, help_text: str) -> flags.FlagHolder:
  """Defines a flag that holds paths with commas between them, as define_path."""
  return flags.DEFINE(_PathsParser(), name, None, help_text, serializer=_COMMAS)


def define_path(name: str, default: str | None, help_text: str) -> flags.FlagHolder:
  """Defines a flag that holds a path, in which ~ is the home."""
  return flags.DEFINE(_PathParser(), name, default, help_text)


def define_config(help_text: str, cls: type | None, default: str | None = None) -> None:
  """Defines the flag --config, a config file whose fields --config.KEY=VALUE overrides.

  cls: the dataclass that the config is built into, whose fields can be overridden where the file
  leaves them out (config.left_out); None: those of the file alone. default: a file.
  """
  config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
  flags.FLAGS["config"].parser = _FileParser(cls, default)


class _FileParser(ConfigFileFlagParser):
  """Loads a config file (load_config), and adds the fields that it leaves out.

  default: the file of a command without --config. added: the keys of those fields, in the config
  that was loaded last.
  """

  def __init__(self, cls: type | None, default: str | None):
    super().__init__("config", lock_config=True)
    self.cls = cls
    self.default = default
    self.added: list[str] = []

  def parse(self, path: str) -> config_dict.ConfigDict:
    config = load_config(path)
    config.lock()
    if self.cls:
      self.added = left_out.add(config, self.cls)
    return config


def run_flags(main: Callable[[], Any], renamed: Renamed = {}) -> None:  # noqa: B006
  """Runs a tool with its own absl flags: parses them and calls main(), with errors as in `run`.

  renamed: earlier names of flags, which still work and print a note.
  """

  def guarded(argv: list[str]) -> None:
    del argv
    try:
      main()
    except UserError as error:
      _fail(error)
    except Exception as error:
      if not is_disk_full(error):  # which is no bug, wherever it is noticed
        raise
      _fail(DiskFull(getattr(error, "filename", None), kept="", error=error))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
      # 128 + SIGINT, as a shell reports it. Not sys.exit: a thread that compiles would go on while
      # the interpreter ends under it, and crash.
      os._exit(130)

  sys.stdout.reconfigure(
    errors="surrogateescape"
  )  # names of files as they were given, in any bytes
  use_huge_pages()  # before anything else: it may start the process once more
  # --help lists the flags of all modules of this package; absl's default is the main module's alone
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith("hiar_jax."):
      for flag in defined:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(guarded, flags_parser=lambda argv: _parse(_with_new_flags(argv, renamed)))


def with_new_names(options: Mapping[str, Any], renamed: Renamed) -> dict[str, Any]:
  """Returns options under their present names; prints a note for each that had an earlier one."""
  found = {}
  for name, value in options.items():
    new, values = _new_name(name, renamed)
    if new != name:
      print(f"note: {name} is now called {new}", file=sys.stderr)
    # values are looked up where they can be renamed: a config among the options has no hash
    found[new] = values.get(value, value) if values else value
  return found


def _new_name(name: str, renamed: Renamed) -> tuple[str, Mapping[str, str]]:
  """Returns (present name, {earlier value: present value})."""
  entry = renamed.get(name, name)
  return (entry, {}) if isinstance(entry, str) else entry


def _with_new_flags(argv: list[str], renamed: Renamed) -> list[str]:
  """Returns a command line with renamed flags replaced, in the forms --a=b, --a b and --noa."""
  found = []
  values = {}  # of the flag before, where its value is the next argument
  for argument in argv:
    match = re.match(r"^--?(no)?([a-z_]+)(=.*)?$", argument, re.DOTALL)
    if match and match[2] in renamed:
      name, values = _new_name(match[2], renamed)
      print(f"note: --{match[2]} is now called --{name}", file=sys.stderr)
      argument = f"--{match[1] or ''}{name}"
      if match[3] is not None:
        value = match[3].removeprefix("=")
        argument += "=" + values.get(value, value)
        values = {}
    else:
      argument, values = values.get(argument, argument), {}
    found.append(argument)
  return found


def use_huge_pages() -> None:
  """Restarts this process with glibc's huge pages, where it runs without.

  XLA allocates the temporary memory of each step again; on a CPU, with small pages, 20 % of the
  time goes into touching it. The allocator reads its settings when a process starts, so they cannot
  be changed later. Does nothing where the user has set GLIBC_TUNABLES, outside Linux, or where this
  process is not `python -m`.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and "-m" in sys.orig_argv:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(error: UserError) -> None:
  """Prints the message as one line and exits with status 2."""
  print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
  sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; exits with one line where absl would print usage or a traceback."""
  parser = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
  if isinstance(parser, _FileParser) and parser.default and _config_arguments(argv)[0] is None:
    # as a default of the flag it would be loaded, and overridden, while the flag is defined
    argv = [argv[0], f"--config={parser.default}", *argv[1:]]
  try:
    try:
      rest = flags.FLAGS(argv)
    except (AttributeError, LookupError, OSError, TypeError, ValueError, flags.Error) as error:
      raise _explain(argv, error) from error
    if len(rest) > 1:
      raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      _drop_left_out()
    if flags.FLAGS["verbosity"].using_default_value:
      # app.run would set INFO, at which Orbax logs many lines for each save
      flags.FLAGS.verbosity = logging.WARNING
    return rest
  except UserError as error:
    _fail(error)


def _drop_left_out() -> None:
  """Takes the fields that no override has set out of the config again."""
  flag = flags.FLAGS["config"]
  if isinstance(flag.parser, _FileParser) and flag.parser.cls:
    changed = config_flags.get_override_values(flag)
    left_out.drop(flag.value, flag.parser.cls, flag.parser.added, changed)
    flag.parser.added = []


# ---------------------------------------------------------------------- what was wrong, in one line


def _explain(argv: list[str], error: Exception) -> UserError:
  """Returns an error that names the wrong part: the file, its variant, a key, a value or a flag.

  ml_collections reports most of them alike, so the config is loaded here once more and each
  override is compared with it.
  """
  spec, overrides = _config_arguments(argv)
  if spec is not None:
    config, cls = load_config(spec), getattr(flags.FLAGS["config"].parser, "cls", None)
    if cls:
      left_out.add(config, cls)
    names = dict(walk(config))
    for key, text in overrides:
      # levels[0] indexes the field `levels`
      if key.split("[")[0] not in names:
        group = cls and left_out.without_default(config, cls, key)
        if group:
          return UserError(
            f"--config.{key}: the config {spec} has no group {group!r}, so nothing in it can be "
            "set; add the group in a config file of your own"
          )
        return UserError(f"--config.{key}: the config {spec} has no such key; {_hint(key, names)}")
      if isinstance(error, flags.IllegalFlagValueError) and f"config.{key}={text}" in str(error):
        return UserError(f"--config.{key}={text}: expected {_kind(config, key)}")
  elif overrides:
    return UserError(
      f"--config.{overrides[0][0]} overrides a config, but --config is missing or comes after it"
    )
  return UserError(str(error).replace("FATAL Flags parsing error:", "").strip())


def _hint(key: str, names: Mapping[str, Any]) -> str:
  """Returns what a key that there is not may have been: one close to it, one of that name in
  another group, or what its group has.
  """
  group, _, name = key.rpartition(".")
  if not group or group not in names:
    return nearest(key, names)
  inside = sorted(x[len(group) + 1 :] for x in names if x.rpartition(".")[0] == group)
  close = difflib.get_close_matches(name, inside, n=1)
  elsewhere = [x for x in names if x.rpartition(".")[2] == name]
  if close or elsewhere:
    return f"did you mean {f'{group}.{close[0]}' if close else elsewhere[0]!r}?"
  return f"{group} has {', '.join(inside)}"


def _kind(config: config_dict.ConfigDict, key: str) -> str:
  """Returns what a field takes: its type with its present value, or that it is a group."""
  *groups, name = key.split(".")
  for group in groups:
    config = config[group]
  if isinstance(config[name], config_dict.ConfigDict):
    return f"no value: it is a group, of {', '.join(config[name])}"
  kind = config.get_type(name).__name__  # a placeholder has a type before it has a value
  return kind if config[name] is None else f"{kind}, as {config[name]!r}"


def _config_arguments(argv: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
  """Returns the value of --config and the overrides [(key, text)], from --a=b and --a b alike."""
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


def load_config(spec: str) -> config_dict.ConfigDict:
  """Loads the config of a spec FILE[:VARIANT]. Raises UserError with the line where that fails."""
  name, _, variant = os.path.expanduser(spec).partition(":")
  if not os.path.isfile(name):
    there = [str(path) for path in pathlib.Path(os.path.dirname(name)).glob("*.py")]
    raise UserError(f"--config={spec}: there is no file {name!r}; {nearest(name, there)}")
  try:
    defined = runpy.run_path(name)
    if "get_config" not in defined:
      raise UserError(f"--config={spec}: {name} has no function get_config(), which returns one")
    config = defined["get_config"](*([variant] if ":" in spec else []))
  except UserError:
    raise
  except Exception as error:  # any kind: the file is code of the user
    # the innermost frame: a lookup in the file's table VARIANTS is a variant that does not exist
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    table = frame.f_globals.get("VARIANTS", ())
    if isinstance(error, KeyError) and error.args == (variant,) and table:
      raise UserError(
        f"--config={spec}: there is no variant {variant!r}; {nearest(variant, table)}"
      ) from error
    raise UserError(f"--config={spec}: {_place(error, name)}: {_in_words(error)}") from error
  if not isinstance(config, config_dict.ConfigDict):
    kind = "None" if config is None else type(config).__name__
    raise UserError(f"--config={spec}: get_config() returned {kind}, expected a ConfigDict")
  return config


def _place(error: Exception, name: str) -> str:
  """Returns where in the file `name` an error arose: the last line of the file itself, not of a
  library that it calls.
  """
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == name]
  if isinstance(error, SyntaxError) and error.filename == name:  # nothing of it has run
    lines = [error.lineno]
  return f"{name}:{lines[-1]}" if lines and lines[-1] else name


def _in_words(error: Exception) -> str:
  """Returns an error as 'Kind: message'."""
  # the first argument of these is a number, or leaves the file out
  text = str(error if isinstance(error, OSError | SyntaxError) else [*error.args, ""][0])
  if "\\n" in text:  # ml_collections' own advice comes quoted, in one KeyError after another
    text = text.replace("\\'", "").replace("\\n", "; ").strip("'")
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
