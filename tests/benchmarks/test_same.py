"""The bit-for-bit comparison of two trees: whose code runs, what is run again, what is told."""

import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

from benchmarks import same, same_commands, trees
from benchmarks.same_commands import Command
from hiar_jax.config.building import build
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run

COMMAND = """
import pathlib, sys
import hiar_jax
pathlib.Path(sys.argv[1].partition("=")[2]).write_text(f"{hiar_jax.VALUE}\\n")
print("wrote", *sys.argv[1:])
sys.exit(hiar_jax.STATUS)
"""
PARTS = {"hiar": [Command(name, "hiar_jax.write", (f"--out={name}.txt",)) for name in "ab"]}


def git(root: pathlib.Path, *arguments: str) -> None:
  who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
  subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> pathlib.Path:
  """One that stands for this one, with a command that writes a number."""
  root = tmp_path / "repository"
  for package in trees.PACKAGES:
    (root / package).mkdir(parents=True)
    (root / package / "__init__.py").write_text("VALUE, STATUS = 1, 0\n")
  (root / "hiar_jax" / "write.py").write_text(COMMAND)
  (root / ".gitignore").write_text("*.log\n")
  git(root, "init")
  git(root, "add", ".")
  git(root, "commit", "-m", "one")
  return root


def become(repository: pathlib.Path, value: int, status: int) -> None:
  (repository / "hiar_jax" / "__init__.py").write_text(f"VALUE, STATUS = {value}, {status}\n")


# ------------------------------------------------------------------------------------------- trees


def test_a_revision_and_the_working_tree(repository, tmp_path):
  become(repository, 2, 0)
  (repository / "hiar_jax" / "write.py").unlink()
  (repository / "new.py").write_text("")
  (repository / "a.log").write_text("")
  old, new = tmp_path / "old", tmp_path / "new"
  trees.unpack("HEAD", old, repository)
  trees.snapshot(new, repository)
  names = lambda root: {path.name for path in root.rglob("*.*") if path.is_file()}
  assert names(old) == {"__init__.py", ".gitignore", "write.py"}
  assert names(new) == {"__init__.py", ".gitignore", "new.py"}
  for tree, line in ((old, "VALUE, STATUS = 1, 0\n"), (new, "VALUE, STATUS = 2, 0\n")):
    assert (tree / "hiar_jax" / "__init__.py").read_text() == line
  head = trees.commit("HEAD", repository)[:12]
  assert trees.name_of_working_tree(repository) == f"working tree at {head} with changes"
  with pytest.raises(trees.TreeError, match="^git rev-parse [^\n]*nowhere[^\n]*$"):
    trees.unpack("nowhere", tmp_path / "none", repository)


def test_a_tree_runs_with_its_own_code_alone(repository, tmp_path):
  """Not even a module that it lacks comes from the checkout that is installed here."""
  trees.check(repository)
  code = "import hiar_jax; print(hiar_jax.VALUE); import hiar_jax.errors"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env=trees.environment(repository),
    capture_output=True,
    text=True,
  )
  assert done.stdout == "1\n" and "No module named 'hiar_jax.errors'" in done.stderr
  shutil.rmtree(repository / "benchmarks")
  with pytest.raises(trees.TreeError, match="No module named 'benchmarks'"):
    trees.check(repository)


def test_a_stranger_is_noticed(repository, tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(repository))
  other = tmp_path / "other"
  for package in trees.PACKAGES[:2]:
    (other / package).mkdir(parents=True)
    (other / package / "__init__.py").write_text("")
  with pytest.raises(trees.TreeError, match="benchmarks/__init__.py, which is not its own"):
    trees.check(other)


# -------------------------------------------------------------------------------------- comparison


def compare(repository, tmp_path, *arguments: str) -> int:
  options = same.parse(["HEAD", "--parts=hiar", f"--keep={tmp_path / 'kept'}", *arguments])
  return same.same(options, PARTS, repository)


@pytest.mark.slow
def test_commands_of_both_trees_are_compared(repository, tmp_path, capfd):
  """And the revision's are not run again where they are kept."""
  assert compare(repository, tmp_path) == 0
  first = capfd.readouterr()
  lines = first.out.splitlines()
  for name in ("a.txt: values 1", "b.txt: values 1", "commands/b.json: values 2"):
    assert f"same    hiar/{name}" in lines
  assert lines[-1] == f"{len(lines) - 2} things compared, 0 differ"
  assert first.err.count("old hiar: a,") == first.err.count("new hiar: a,") == 1
  become(repository, 2, 3)
  assert compare(repository, tmp_path) == 4  # two files, two exit statuses
  second = capfd.readouterr()
  assert "DIFFERS hiar/b.txt: values 1" in second.out.splitlines()
  head = "the first of 4 differences in hiar:\n  hiar/a.txt: 1 of 2 bytes, first at [0]: 49 -> 50"
  assert head in second.out and "hiar/commands/a.json: status: 0 -> 3" in second.out
  assert "old hiar: a," not in second.err and "new hiar: a ended with status 3" in second.err


@pytest.mark.slow
def test_a_revision_that_fails_leaves_nothing_to_compare(repository, tmp_path, capfd):
  become(repository, 1, 1)
  git(repository, "commit", "-a", "-m", "two")
  with pytest.raises(trees.TreeError, match="(old|new) hiar: a ended with status 1"):
    compare(repository, tmp_path, "--self")
  said = capfd.readouterr()
  assert "hiar: b," not in said.err and "Traceback" not in said.err and not said.out


def test_wrong_names_are_refused(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["same", "nowhere"])
  assert same.main() == 2
  assert capsys.readouterr().err.splitlines()[-1].startswith("error: git rev-parse")
  with pytest.raises(SystemExit, match="2"):
    same.parse(["HEAD", "--parts=hiar,nothing"])
  assert "there is no 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("method", same_commands.SETTINGS)
def test_the_runs_are_experiments(method):
  """Every override names a field, and what comes out is sound."""
  path = tiny_run.ROOT / "experiments" / same_commands.CONFIGS[method]
  config = runpy.run_path(str(path))["get_config"]("smoke")
  overrides = {**same_commands.SMALL, **same_commands.SETTINGS[method]}
  config.update_from_flattened_dict(overrides)
  assert build(Experiment, config).data.clips == 16
