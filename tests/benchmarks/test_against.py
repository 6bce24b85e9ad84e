"""Two trees measured side by side: the arithmetic, the order, and what is seen of a process."""

import pytest

from benchmarks import against, trees
from benchmarks.against import ratio, spread
from benchmarks.against_jobs import JOBS, Job, Options, Tree
from tests.helpers import tiny_run


def test_median_and_spread():
  assert spread([3.0, 1.0, 2.0, 10.0]) == against.Spread(2.5, 1.0, 10.0)


def test_ratios_are_of_rounds():
  """A machine that gets slower from round to round slows both trees: their ratio stays."""
  assert ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == against.Spread(2.0, 2.0, 2.0)
  assert ratio([1.0, 2.0, 4.0], [1.5, 2.0, 2.0]) == against.Spread(1.0, 0.5, 1.5)
  with pytest.raises(ValueError):
    ratio([1.0], [1.0, 2.0])


@pytest.fixture
def sides(tmp_path) -> tuple[Tree, Tree]:
  for name in ("old", "new"):
    (tmp_path / name).mkdir()
  return tuple(Tree(name, tiny_run.ROOT, tmp_path / name) for name in ("old", "new"))


def test_rounds_alternate_and_the_first_is_not_counted(sides):
  calls = []

  def measure(tree, options):
    calls.append(tree.name)
    return {"x": float(len(calls))}

  job = Job("", measure, prepare=lambda tree, options: calls.append(f"prepare {tree.name}"))
  found = against.rounds(job, sides, Options(), 4)
  assert calls == [
    "prepare old",
    "prepare new",
    "new",
    "old",
    *"old new new old old new new old".split(),
  ]
  numbers = {name: [values["x"] for values in rounds] for name, rounds in found.items()}
  assert numbers == {"old": [5.0, 8.0, 9.0, 12.0], "new": [6.0, 7.0, 10.0, 11.0]}


def test_the_table_says_what_it_measured():
  old = [
    {"a": 2.0, "b": 0.01, "memory": 2.0**30, "gone": 1.0},
    {"a": 4.0, "b": 0.03, "memory": 2.0**30, "gone": 1.0},
  ]
  new = [{"a": 1.0, "b": 0.02, "memory": 2.0**29}, {"a": 4.0, "b": 0.03, "memory": 2.0**29}]
  _, _, *lines = against.table(old, new)
  assert lines == [
    "| a | 3.00 (2.00..4.00) s | 2.50 (1.00..4.00) s | 0.750 (0.500..1.000) |",
    "| b | 20.0 (10.0..30.0) ms | 25.0 (20.0..30.0) ms | 1.500 (1.000..2.000) |",
    "| memory | 1024 (1024..1024) MiB | 512 (512..512) MiB | 0.500 (0.500..0.500) |",
    "| gone | 1.00 (1.00..1.00) s | - | - |",
  ]


def test_a_process_is_watched(sides):
  """Its time and its CPU time, the most memory that it held, and when each line came."""
  code = """import time
print("a.mp4", flush=True)
time.sleep(0.5)
held = bytearray(1 << 26)
print('{"b": 1}')
"""
  ended = sides[0].run("-c", code)
  (first, _), (second, line) = ended.lines
  assert 0.4 < second - first <= ended.wall and ended.cpu < ended.wall and line == '{"b": 1}'
  assert ended.memory > 1 << 26
  assert ended.values("x") == {
    "x": ended.wall,
    "x, CPU": ended.cpu,
    "x, memory": float(ended.memory),
  }


def test_a_process_that_fails_says_why(sides):
  with pytest.raises(trees.TreeError, match=r"old: .* ended with 3\n  because"):
    sides[0].run("-c", "import sys; print('because', file=sys.stderr); sys.exit(3)")
  assert sides[0].run("-c", "import sys; sys.exit(3)", statuses=(0, 3)).lines == []


def test_wrong_names_are_refused(monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["against", "HEAD", "--jobs=start,nothing"])
  with pytest.raises(SystemExit, match="2"):
    against.parse()
  assert "there is no 'nothing'" in capsys.readouterr().err
  monkeypatch.setattr("sys.argv", ["against", "nowhere"])
  assert against.main() == 2 and capsys.readouterr().err.startswith("error: git rev-parse")


@pytest.mark.slow
def test_starting_is_measured(sides):
  found = JOBS["start"].measure(sides[1], Options())
  assert (
    0 < found["import hiar_jax"] < found["train --help"] and found["train --help, memory"] > 2**26
  )
