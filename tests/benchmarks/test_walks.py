"""The counter of stack frames and files: on toy graphs, on a toy package, and its own run."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import walk_hook, walks
from benchmarks.walk_hook import Holdings, Sizes
from tests.helpers import tiny_run

SIZES = Sizes(text=13, latents=(5, 5, 7), frame=40)
LATENTS = np.zeros((2, 3, 5, 5, 7))

TOY = {
  "toy/__init__.py": "",
  "toy/low.py": """
def call(function, value):
  return function(value)

def take(values):
  return [value for value in values]

def ignore(number):
  return number + 1
""",
  "toy/models/__init__.py": "",
  "toy/models/words.py": """
import numpy as np

def encode(prompt):
  return np.full((1, 13, 11), len(prompt), np.float32)
""",
  "toy/models/net.py": """
import flax.linen as nn

class Net(nn.Module):
  @nn.compact
  def __call__(self, x, text):
    return x * inside(text).mean()

def inside(text):
  return 2 * text

def bind(text):
  return lambda x: Net().apply({}, x, text)
""",
  "toy/command.py": """
import sys

import jax
import numpy as np

from toy import low
from toy.models import net, words

def generate(x, text):
  return low.call(net.bind(text), x)

def show(latents):
  return np.zeros((1, 3, 40, 40, 3), np.uint8)

def frames(latents):
  yield from show(latents)

def main():
  latents = jax.jit(generate)(np.ones((1, 3, 5, 5, 7)), words.encode(sys.argv[1]))
  low.ignore(3)
  low.take(frames(latents))
  return low.call(show, latents)

main()
""",
}


def levels_of(**imports: str) -> dict[str, int]:
  return walks.levels({name: set(imported.split()) for name, imported in imports.items()})


def test_a_module_stands_above_all_it_imports():
  assert levels_of(a="", b="a", c="a b", d="a") == {"a": 1, "b": 2, "c": 3, "d": 2}


def test_a_circle_stands_on_one_level():
  assert levels_of(a="", b="a c", c="b", d="c") == {"a": 1, "b": 2, "c": 2, "d": 3}


def test_floors_are_of_subpackages_and_within_them():
  graph = {
    "p": "",
    "p.a": "",
    "p.m.low": "p.a",
    "p.m.high": "p.m.low",
    "p.b": "p.m.low",
    "p.n.x": "",
  }
  floor = walks.floors({name: set(imported.split()) for name, imported in graph.items()})
  assert floor["p.m.low"] == (2, 1) and floor["p.m.high"] == (2, 2) and floor["p.b"] == (3, 1)
  assert floor["p.a"] == floor["p.n.x"] == (1, 1)
  climbs = lambda caller, callee: walks.climbs_up((caller, "f"), (callee, "g"), floor)
  assert climbs("p/a.py", "p/m/low.py") and climbs("p/m/high.py", "p/b.py")
  assert climbs("p/m/low.py", "p/m/high.py") and not climbs("p/m/high.py", "p/m/low.py")
  assert not climbs("p/b.py", "p/m/high.py") and not climbs("p/a.py", "p/n/x.py")


def test_imports_are_found_in_functions_and_in_both_spellings(tmp_path):
  files = {
    "p/__init__.py": "",
    "p/a.py": "import os",
    "p/m/__init__.py": "",
    "p/m/c.py": "from p.a import f",
    "p/b.py": "from p import a\ndef f():\n  import p.m.c\n  from p.m import Thing",
  }
  write(tmp_path, files)
  assert walks.import_graph(tmp_path / "p") == {
    "p": set(),
    "p.a": set(),
    "p.m": set(),
    "p.m.c": {"p.a"},
    "p.b": {"p.a", "p.m", "p.m.c"},
  }


def write(directory, files: dict[str, str]) -> None:
  for name, text in files.items():
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


@pytest.mark.parametrize(
  "shape, kind",
  [
    ((13,), "text:1"),
    ((4, 13), "text:4"),
    ((2, 4, 13, 11), "text:4"),
    ((5, 5, 7), "latents"),
    ((2, 3, 5, 5, 7), "latents"),
    ((3, 40, 40, 3), "frames"),
    ((320, 320, 3), "frames"),
    ((3, 41, 41, 3), None),
    ((40, 3), None),
    ((0, 0, 3), None),
    ((), None),
    ((5, 5, 8), None),
  ],
)
def test_arrays_are_known_by_their_sizes(shape, kind):
  assert SIZES.kind(shape) == kind


class Model:
  """Made of a text, and keeps what it once encoded."""

  def __init__(self, text=None):
    self.text = text

  @functools.cached_property
  def latents(self):
    return LATENTS

  def read(self):
    return self.text


def frames(latents):
  yield np.zeros((3, 40, 40, 3))
  yield latents


def held(value) -> set[tuple[str, str]]:
  return Holdings(SIZES, lambda file: file == __file__).of(value)


def test_what_a_value_holds():
  text, prompt = np.zeros((1, 13)), "a red circle"
  assert held({"batch": [LATENTS, {prompt: 3}]}) == {("array", "latents"), ("string", prompt)}
  assert held((prompt.encode(), "short", 4.0, None)) == {("string", prompt)}
  assert held(np.asarray([prompt])) == {("string", prompt)}
  for value in (
    lambda: text,
    functools.partial(max, text),
    Model(text).read,
    Model(text),
    Sizes(text, (), 1),
  ):
    assert held(value) == {("array", "text:1")}, value
  assert held(frames(LATENTS)) == {("array", "latents")}
  model = Model()
  assert model.latents is LATENTS and held(model) == set()


def test_a_walk_has_the_files_in_order_and_every_climb_once():
  floor = {"p.low": (1, 1), "p.mid": (2, 1), "p.high": (3, 1), "p.top": (4, 1)}
  low, mid, high, up = ("p/low.py", "f"), ("p/mid.py", "g"), ("p/high.py", "h"), ("p/high.py", "k")
  top = ("p/top.py", "main")
  call = lambda caller, callee, taken=False, given=(), returned=(): {
    "phase": 0,
    "caller": caller,
    "callee": callee,
    "taken": taken,
    "given": dict(given),
    "returned": dict(returned),
  }
  calls = [
    call(None, high, given={"prompt": 5}),
    call(high, mid, returned={"text:4": 2}),
    call(mid, low, given={"text:4": 9}),
    call(low, up, given={"text:1": 10}),
    call(low, up, given={"text:1": 12}),
    call(low, mid, True, returned={"text:1": 13}),
    call(top, mid, returned={"latents": 14}),
    call(low, ("p/high.py", "told nothing")),
  ]
  found = walks.walk(calls, floor)
  assert found["files"] == [
    ("p/mid.py", "g", ["latents", "text"]),
    ("p/high.py", "h", ["prompt", "text"]),
    ("p/low.py", "f", ["text"]),
    ("p/top.py", "main", ["latents"]),
  ]
  assert found["climbs"] == [(low, up, False), (low, mid, True)]


def test_depth_counts_from_main_or_from_the_threads_beginning():
  frames = [["p/run.py", "<module>"], ["p/config.py", "run"], ["p/run.py", "main"], ["p/a.py", "f"]]
  applies = [{"frames": frames}, {"frames": [*frames, ["p/b.py", "g"], ["p/b.py", "h"]]}]
  found = walks.depth(applies, "p/run.py")
  assert (found["first"], found["deepest"]) == (1, 3)
  assert found["stack"] == [("p/a.py", "f"), ("p/b.py", "g"), ("p/b.py", "h")]
  thread = [{"frames": [["p/work.py", "_run"], ["p/a.py", "f"]]}]
  assert walks.depth(thread, "p/run.py")["first"] == 2
  script = [{"frames": [["p/run.py", "<module>"], ["p/a.py", "f"]]}]
  assert walks.depth(script, "p/run.py")["first"] == 1


def test_phases_with_the_same_stacks_are_one_step():
  apply = lambda phase, batch, name: {"phase": phase, "batch": batch, "frames": [["p/a.py", name]]}
  applies = [apply(0, 6, "f"), apply(1, 4, "f"), apply(2, 6, "f"), apply(3, 6, "g")]
  assert walk_hook.different_phases(applies, 6) == [[0, 2], [3]]


def test_a_toy_package_under_the_hook(tmp_path):
  write(tmp_path, TOY)
  out = tmp_path / "out.json"
  request = {
    "module": "toy.command",
    "arguments": ["a red circle"],
    "prompts": ["a red circle"],
    "out": str(out),
    "sizes": {"text": 13, "latents": [5, 5, 7], "frame": 40},
  }
  command = [sys.executable, "-m", "benchmarks.walk_hook", json.dumps(request)]
  environment = {**os.environ, "PYTHONPATH": f"{tiny_run.ROOT}:{tmp_path}"}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  found = walks.walk(report["calls"], walks.floors(walks.import_graph(tmp_path / "toy")))
  assert [file for file, _, _ in found["files"]] == [
    "toy/models/words.py",
    "toy/command.py",
    "toy/models/net.py",
    "toy/low.py",
  ]
  names = {(caller[1], callee[1], taken) for caller, callee, taken in found["climbs"]}
  assert names == {("take", "frames", True), ("call", "show", False)}
  (apply,) = report["applies"]
  assert apply["class"] == "Net" and apply["batch"] == 1
  assert walks.depth(report["applies"], "toy/command.py")["stack"] == [
    ("toy/command.py", "generate"),
    ("toy/low.py", "call"),
    ("toy/models/net.py", "bind.<lambda>"),
  ]
  assert "ignore" not in str(report["calls"]) and "inside" not in str(report["calls"])


@pytest.mark.slow
def test_the_counters_own_run(tmp_path):
  out = tmp_path / "walks.json"
  command = [sys.executable, "-m", "benchmarks.walks", "--list", f"--out={out}"]
  environment = tiny_run.environment()
  done = subprocess.run(command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  steps = ["teacher step", "causal_init step", "critic step", "generator step"]
  assert list(found["depths"]) == [*steps, "generate", "stream"]
  for one in found["depths"].values():
    assert 0 < one["first"] <= one["deepest"] == len(one["stack"])
  captions = {f"caption to {stage}" for stage in ("teacher", "causal_init", "distill", "all three")}
  assert found["walks"].keys() == captions | {"prompt to generate", "prompt to stream"}
  for name, one in found["walks"].items():
    kinds = {kind for _, _, kinds in one["files"] for kind in kinds}
    assert kinds == (
      {"prompt", "text"} if name in captions else {"prompt", "text", "latents", "frames"}
    )
    assert all(line in done.stdout for file, _, _ in one["files"] for line in [f"      {file}: "])
