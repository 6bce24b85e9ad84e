"""From the command line to frozen dataclasses; every way to get it wrong is one line and exit
status 2.
"""

import json
import pathlib
import sys

from ml_collections import ConfigDict
import pytest

from hiar_jax.config import command_line
from tests.helpers.forks import Forks

ROOT = pathlib.Path(__file__).parents[2]

EXPERIMENT = """
from ml_collections import ConfigDict, config_dict

def get_config(variant=""):
  c = ConfigDict()
  c.width = 8
  c.levels = (1.0, 0.5)
  c.name = "plain"
  c.remat = False
  c.distill = ConfigDict(dict(lr=1e-3, ema=config_dict.placeholder(float)))
  if variant == "smoke":
    c.width = 2
  elif variant == "broken":
    c.distil.lr = 1.0
  elif variant:
    raise ValueError(f"no variant {variant!r}")
  return c
"""

JOB = """
import sys
from hiar_jax import files
from hiar_jax.config import command_line as config
from hiar_jax.errors import UserError

def main(c, workdir):
  if workdir == "taken":
    raise UserError("the workdir is\\n  taken")
  if workdir == "locked":
    c.distill.lrr = 1.0
  if workdir == "bug":
    raise ValueError("a bug")
  print(workdir, c.to_json())

config.run(main)
"""

TOOL = """
from absl import flags
from hiar_jax import files
from hiar_jax.config import command_line as config

FRAMES = flags.DEFINE_integer("frames", 9, "")
config.run_flags(lambda: print(FRAMES.value))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """Runs an entry point in a directory that holds shapes.py; -> (exit status, stdout, stderr)."""
  directory = tmp_path_factory.mktemp("job")
  (directory / "shapes.py").write_text(EXPERIMENT)
  imports = "import ml_collections, hiar_jax.config.building, hiar_jax.config.command_line"
  forks = Forks(directory, ROOT, imports)
  yield lambda *arguments, code=JOB: forks.run(code, arguments)
  forks.close()


# ------------------------------------------------------------------------------------- command line


def test_variant_and_overrides_reach_main(job):
  overrides = [
    "--config.distill.lr=1",
    "--config.levels=(1.0, 0.7)",
    "--config.remat",
    "--config.distill.ema=0.9",
  ]
  status, out, err = job("--config=shapes.py:smoke", "--workdir=runs/a", *overrides)
  workdir, text = out.split(" ", 1)
  assert (status, workdir, err) == (0, "runs/a", "")
  assert json.loads(text) == {
    "width": 2,
    "levels": [1.0, 0.7],
    "name": "plain",
    "remat": True,
    "distill": {"lr": 1.0, "ema": 0.9},
  }


GOOD = ["--config=shapes.py", "--workdir=w"]
BAD_INPUT = {
  "a mistyped key": (
    [*GOOD, "--config.distill.lrr=1"],
    "--config.distill.lrr: the config shapes.py has no such key; did you mean 'distill.lr'?",
  ),
  "a mistyped group": (
    [*GOOD, "--config.distil.lr", "1"],
    "--config.distil.lr: the config shapes.py has no such key",
  ),
  "a key that is like none of its group": (
    [*GOOD, "--config.distill.num=1"],
    "--config.distill.num: the config shapes.py has no such key; distill has ema, lr",
  ),
  "a key of another group": (
    [*GOOD, "--config.distill.width=1"],
    "--config.distill.width: the config shapes.py has no such key; did you mean 'width'?",
  ),
  "a float for an int": ([*GOOD, "--config.width=1.5"], "--config.width=1.5: expected int, as 8"),
  "a word for a float": (
    [*GOOD, "--config.distill.lr=fast"],
    "--config.distill.lr=fast: expected float, as 0.001",
  ),
  "a word for a bool": (
    [*GOOD, "--config.remat=maybe"],
    "--config.remat=maybe: expected bool, as False",
  ),
  "a word for an empty float": (
    [*GOOD, "--config.distill.ema=x"],
    "--config.distill.ema=x: expected float",
  ),
  "half a tuple": (
    [*GOOD, "--config.levels=(1,"],
    "--config.levels=(1,: expected tuple, as (1.0, 0.5)",
  ),
  "a value for a group": (
    [*GOOD, "--config.distill=3"],
    "--config.distill=3: expected no value: it is a group, of ",
  ),
  "an index into a tuple": ([*GOOD, "--config.levels[0]=3"], "0 is not a valid index"),
  "a file that is not there": (
    ["--config=shape.py", "--workdir=w"],
    "--config=shape.py: there is no file 'shape.py'; did you mean 'shapes.py'?",
  ),
  "a variant that is not there": (
    ["--config=shapes.py:tiny", "--workdir=w"],
    "--config=shapes.py:tiny: shapes.py:16: ValueError: no variant 'tiny'",
  ),
  "a config file with a typo": (
    ["--config=shapes.py:broken", "--workdir=w"],
    "--config=shapes.py:broken: shapes.py:14: AttributeError: distil; Did you mean",
  ),
  "no config": (
    ["--workdir=w"],
    "--config is missing; give a config file, as --config=experiments/shapes.py",
  ),
  "no workdir": (["--config=shapes.py"], "--workdir is missing; give the run a directory"),
  "an override without a config": (
    ["--config.width=3"],
    "--config.width overrides a config, but --config is missing",
  ),
  "an override before its config": (
    ["--config.width=3", *GOOD],
    "Found --config.width=3 in argv before a value for",
  ),
  "an unknown flag": (
    [*GOOD, "--wrkdir=w"],
    "Unknown command line flag 'wrkdir'. Did you mean: workdir ?",
  ),
  "a stray word": ([*GOOD, "smoke"], "unexpected argument 'smoke'; flags are written --name=value"),
  "a user error below": (["--config=shapes.py", "--workdir=taken"], "the workdir is taken"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(job, case):
  arguments, message = BAD_INPUT[case]
  status, out, err = job(*arguments)
  assert (status, out) == (2, "")
  assert len(err.splitlines()) == 1 and err.startswith("error: ")
  assert message in err


def test_a_bug_keeps_its_traceback(job):
  status, _, err = job("--config=shapes.py", "--workdir=bug")
  assert status == 1 and "Traceback" in err and "ValueError: a bug" in err


def test_notes_of_libraries_are_shown_on_request(job):
  code = (
    "from absl import logging\nfrom hiar_jax.config import command_line\n"
    "command_line.run_flags(lambda: logging.info('a note'))"
  )
  assert job(code=code) == (0, "", "")
  assert "a note" in job("--verbosity=0", code=code)[2]


def test_a_tool_has_its_own_flags(job):
  assert job("--frames=3", code=TOOL) == (0, "3\n", "")
  status, _, err = job("--frames=three", code=TOOL)
  assert status == 2 and len(err.splitlines()) == 1 and "flag --frames=three" in err


@pytest.mark.skipif(sys.platform != "linux", reason="glibc reads GLIBC_TUNABLES")
def test_a_command_starts_again_with_huge_pages_once(monkeypatch):
  started = []
  monkeypatch.setattr(command_line.os, "execv", lambda *command: started.append(command))
  monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "hiar_jax.train", "--help"])
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  command_line.use_huge_pages()
  python = sys.executable
  assert started == [(python, [python, "-X", "dev", "-m", "hiar_jax.train", "--help"])]
  command_line.use_huge_pages()
  monkeypatch.delenv("GLIBC_TUNABLES")
  monkeypatch.setattr(sys, "orig_argv", ["python", "script.py"])
  command_line.use_huge_pages()
  assert len(started) == 1


def test_main_cannot_add_a_key(job):
  status, _, err = job("--config=shapes.py", "--workdir=locked")
  assert status == 1 and "locked" in err and "lrr" in err


# ------------------------------------------------------------------- fields that a file leaves out

TYPED_JOB = """
import dataclasses
from hiar_jax.config import command_line
from hiar_jax.config.building import build, of_kinds

@dataclasses.dataclass(frozen=True)
class Distill:
  lr: float
  ema: float | None = None
  shift: float = 5
  rounds: int = 1
  orders: tuple[str, ...] = ("vanilla",)
  remat: bool = False

@dataclasses.dataclass(frozen=True)
class Tall:
  kind: str = "tall"
  height: int = 4

@dataclasses.dataclass(frozen=True)
class Wide:
  height: int = 8
  width: int = 8

@dataclasses.dataclass(frozen=True)
class Job:
  width: int
  levels: tuple[float, ...]
  name: str
  remat: bool
  distill: Distill
  weights: Wide = Wide()
  net: object = of_kinds({"tall": Tall, "wide": Wide}, default=Tall())
  packed: Wide | None = None
  paced: float = 1.0

def main(c, workdir):
  build(Job, c)
  print(c.to_json(sort_keys=False))

command_line.run(main, Job)
"""
PLAIN = {
  "width": 8,
  "levels": [1.0, 0.5],
  "name": "plain",
  "remat": False,
  "distill": {"lr": 1e-3, "ema": None},
}


ALL_KINDS = [
  "--config.paced=2",
  "--config.distill.shift",
  "2.5",
  "--config.distill.orders=('a', 'b')",
  "--config.distill.remat",
  "--config.weights.width=9",
  "--config.width=2",
  # 4 is the other kind's default, and stands first in the registry
  "--config.net.height=4",
  "--config.net.kind=wide",
]
DEFAULTS = [
  "--config.distill.rounds=3",
  "--config.distill.rounds=1",
  "--noconfig.distill.remat",
  "--config.net.kind=tall",
]


@pytest.mark.parametrize(
  "overrides, found",
  [
    ([], {}),
    (
      ALL_KINDS,
      {
        "paced": 2.0,
        "distill": {"shift": 2.5, "orders": ["a", "b"], "remat": True},
        "weights": {"width": 9},
        "width": 2,
        "net": {"kind": "wide", "height": 4},
      },
    ),
    # what is the default anyhow leaves the config, and with it a run's identity, as it is
    (DEFAULTS, {}),
  ],
)
def test_fields_that_the_file_leaves_out_can_be_set(job, overrides, found):
  status, out, err = job("--config=shapes.py", "--workdir=w", *overrides, code=TYPED_JOB)
  assert (status, err) == (0, "")
  wanted = {**PLAIN, **found, "distill": {**PLAIN["distill"], **found.get("distill", {})}}
  assert json.loads(out) == wanted


@pytest.mark.parametrize(
  "override, message",
  [
    (
      "--config.distill.shfit=1",
      "--config.distill.shfit: the config shapes.py has no such key; did you mean 'distill.shift'?",
    ),
    ("--config.distill.rounds=1.5", "--config.distill.rounds=1.5: expected int, as 1"),
    ("--config.net.width=1", "net has no field 'width'"),  # which the other kind has
    (
      "--config.packed.width=1",
      "--config.packed.width: the config shapes.py has no group 'packed', so nothing in it can be "
      "set; add the group in a config file of your own",
    ),
  ],
)
def test_a_wrong_override_of_a_left_out_field_is_one_line(job, override, message):
  status, out, err = job("--config=shapes.py", "--workdir=w", override, code=TYPED_JOB)
  assert (status, out, len(err.splitlines())) == (2, "", 1)
  assert message in err


# -------------------------------------------------------------------------- names that have changed

RENAMED = {
  "stages": "level_devices",
  "memory": "report_memory",
  "sink_place": ("sink_positions", {"true": "absolute", "carried": "relative"}),
}
RENAMING_TOOL = f"""
from absl import flags
from hiar_jax.config import command_line

LEVELS = flags.DEFINE_integer("level_devices", 1, "")
MEMORY = flags.DEFINE_bool("report_memory", True, "")
SINK = flags.DEFINE_enum("sink_positions", "absolute", ["absolute", "relative"], "")
PROMPT = flags.DEFINE_string("prompt", "", "")
command_line.run_flags(
  lambda: print(LEVELS.value, MEMORY.value, SINK.value, PROMPT.value), renamed={RENAMED!r}
)
"""


@pytest.mark.parametrize(
  "arguments, printed, notes",
  [
    (["--level_devices=2"], "2 True absolute ", 0),
    (["--stages=2"], "2 True absolute ", 1),
    (["--stages", "4", "--prompt=true"], "4 True absolute true", 1),
    (["--nomemory"], "1 False absolute ", 1),
    (["--sink_place=carried"], "1 True relative ", 1),
    (["--sink_place", "carried", "--prompt", "carried"], "1 True relative carried", 1),
    (["--memory", "--prompt=--stages"], "1 True absolute --stages", 1),
  ],
)
def test_flags_work_by_their_old_names_and_say_so(job, arguments, printed, notes):
  status, out, err = job(*arguments, code=RENAMING_TOOL)
  assert (status, out) == (0, f"{printed}\n"), err
  assert err.count("is now called --") == notes == len(err.splitlines())


def test_options_work_by_their_old_names_and_say_so(capsys):
  """A config among them, which has no hash, comes through as it is."""
  config = ConfigDict({"seed": 1})
  options = {"stages": 2, "sink_place": "carried", "config": config, "prompt": "carried"}
  found = command_line.with_new_names(options, RENAMED)
  assert found.pop("config") is config
  assert found == {"level_devices": 2, "sink_positions": "relative", "prompt": "carried"}
  assert capsys.readouterr().err.count("is now called") == 2


def test_a_field_of_the_default_file_that_is_not_there_is_one_line(job):
  """Of a command that takes a config of its own where none is given, from the package's folder."""
  code = f"import os, runpy; os.chdir({str(ROOT)!r}); runpy.run_module('benchmarks.train', "
  status, _, err = job("--config.distill.latent=1", code=f"{code}run_name='__main__')")
  assert status == 2 and err.count("\n") == 1, err
  assert "experiments/shapes.py has no such key; distill has accumulate, " in err
