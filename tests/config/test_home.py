"""~ is the home, in every path that a command or a config is given."""

import ast
import os
import pathlib

from absl import flags
import pytest

from experiments import hiar_wan_1_3b, wan_framepack
from hiar_jax.config import command_line
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.generation.model_options import ModelOptions
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import open_run, read_config
from tests.helpers import tiny_run

PACKAGE = pathlib.Path(command_line.__file__).parents[1]
# Flags that hold a text which is no path; plan expands its cache, whose default has a ~ too.
NO_PATHS = {"prompt", "frames", "order", "takes", "host", "on", "program", "cache", "reference"}
NO_PATHS |= {"entry", "max_shard", "timeline"}  # timeline.read expands what is no text


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  monkeypatch.chdir(tmp_path)
  return tmp_path / "home"


def test_flags(home, monkeypatch):
  values, define = flags.FlagValues(), flags.DEFINE
  monkeypatch.setattr(
    command_line.flags, "DEFINE", lambda *args, **kw: define(*args, flag_values=values, **kw)
  )
  command_line.define_path("out", None, "")
  command_line.define_path("here", "here.mp4", "")
  command_line.define_paths("runs", "")
  values(["command", "--out=~/a b.mp4", "--runs=~/one,runs/two"])
  assert values.out == f"{home}/a b.mp4" and values.here == "here.mp4"
  assert values.runs == [f"{home}/one", "runs/two"]
  values(["command", "--out=a~b", "--runs="])
  assert values.out == "a~b" and values.runs == []


@pytest.mark.parametrize(
  "path, said",
  [
    ("a/" + "b" * 256 + "/c", "bbb...: a name of 256 bytes; a file's has at most 255"),
    ("é" * 128, "a name of 256 bytes"),
    ("a\0.mp4", "'a\\\\x00.mp4': a zero byte"),
  ],
)
def test_names_that_no_file_has(path, said):
  values = flags.FlagValues()
  flags.DEFINE(command_line._PathParser(), "out", None, "", flag_values=values)
  flags.DEFINE(command_line._PathsParser(), "runs", None, "", flag_values=values)
  for given in (f"--out={path}", f"--runs=b,{path}"):
    with pytest.raises(UserError, match=said):
      values(["command", given])
  with pytest.raises(UserError, match=said):
    build(Experiment, tiny_run.make_config(stages_from=path))
  values(["command", f"--out={'b' * 255}"])


def test_every_flag_that_holds_a_path_is_defined_as_one():
  for file in PACKAGE.rglob("*.py"):
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    plain = {x.args[0].value for x in calls if ast.unparse(x.func) == "flags.DEFINE_string"}
    assert plain <= NO_PATHS, f"{file}: {plain - NO_PATHS}"
    if file.name in ("generate.py", "stream.py"):
      assert "timeline" in plain, "its texts may be longer than a name"


def test_config_files(home):
  (home / "mine.py").write_text((tiny_run.ROOT / "experiments" / "shapes.py").read_text())
  assert command_line.load_config("~/mine.py:smoke").data.source == "shapes"
  config = command_line._FileParser(Experiment, None).parse("~/mine.py:smoke")
  assert config.data.source == "shapes"


def test_fields_of_configs(home):
  c = wan_framepack.get_config()
  c.data.folder = "~/clips"
  c.sample.prompts = "~/p.txt"
  c.weights.base = c.codec.weights = c.text.weights = "~/w"
  c.text.cache = "~/texts"
  e = build(Experiment, c)
  assert (e.data.folder, e.sample.prompts) == (f"{home}/clips", f"{home}/p.txt")
  assert {e.weights.base, e.codec.weights, e.text.weights} == {f"{home}/w"}
  assert e.text.cache == f"{home}/texts"
  c = hiar_wan_1_3b.get_config()
  c.data.prompts, c.trajectories.pairs = "~/p.txt", "~/pairs"
  c.weights.update(base="~/base", teacher="~/teacher", student="~/student")
  e = build(Experiment, c)
  assert (e.data.prompts, e.trajectories.pairs) == (f"{home}/p.txt", f"{home}/pairs")
  w = e.weights
  assert [w.base, w.teacher, w.student] == [f"{home}/{x}" for x in ("base", "teacher", "student")]


def test_a_run_and_the_one_that_it_borrows_from(home):
  """What is stored is what was given, for a home may be elsewhere on another machine."""
  save_resolved(tiny_run.make_config(**tiny_run.EIGHT), home / "first")
  made = tiny_run.make_run(home / "second", stages_from="~/first")
  read = open_run(read_config(home / "second"), home / "second", save=False)
  for run in (made, read):
    assert run.directory("data") == home / "first" / "data"
  assert read_config(home / "second").stages_from == "~/first"


@pytest.mark.parametrize("given", [{"workdir": "~/none"}, {"weights": "~/none"}])
def test_options_in_python(home, given):
  if "weights" in given:
    given["config"] = hiar_wan_1_3b.get_config()
  with pytest.raises(UserError, match=f"{home}/none"):
    ModelOptions(**given).open_model()
  assert not os.path.exists("~")
