"""`stages_from` leads to the same run from any folder, also after both were moved.

What is borrowed: test_stages.py.
"""

import json
import os
import shutil

import pytest

from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.training.run import open_run, read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_run import EIGHT, make_run, pretend


def lender(run) -> str:
  return os.path.realpath(run.directory("teacher").parent)


def reopened(workdir) -> str:
  return lender(open_run(read_config(workdir), workdir, save=False))


@pytest.fixture
def project(tmp_path, monkeypatch):
  """runs/first, which lends, and a run that names it from the project's folder."""
  (tmp_path / "project").mkdir()
  monkeypatch.chdir(tmp_path / "project")
  save_resolved(tiny_run.make_config(**EIGHT), "runs/first")
  return tmp_path / "project"


@pytest.mark.parametrize("workdir", ["runs/second", "runs/deep/er/second", "../elsewhere/second"])
def test_a_relative_path_holds_from_any_folder(project, monkeypatch, workdir):
  assert lender(make_run(workdir, stages_from="runs/first")) == str(project / "runs" / "first")
  stored = json.loads((project / workdir / "config.json").read_text())["stages_from"]
  assert not os.path.isabs(stored)
  workdir = os.path.normpath(project / workdir)
  for folder in ("/", project / "runs"):
    monkeypatch.chdir(folder)
    assert reopened(workdir) == str(project / "runs" / "first")
  # the command goes on where it was given
  monkeypatch.chdir(project)
  make_run(workdir, stages_from="runs/first")
  make_run(os.path.relpath(workdir), stages_from="runs/first")


def test_both_may_be_moved(project, monkeypatch):
  make_run("runs/second", stages_from="runs/first")
  monkeypatch.chdir("/")
  moved = project.rename(project.parent / "moved")
  # a run of the same name in the folder of the command is another one
  save_resolved(tiny_run.make_config(**EIGHT), project / "runs" / "first")
  monkeypatch.chdir(project)
  assert reopened(moved / "runs" / "second") == str(moved / "runs" / "first")


def test_what_an_earlier_version_stored_is_found(project, monkeypatch):
  """As it was typed, in a folder above the workdir."""
  save_resolved(tiny_run.make_config(**EIGHT, stages_from="runs/first"), "runs/deep/second")
  assert reopened("runs/deep/second") == str(project / "runs" / "first")
  monkeypatch.chdir("/")
  assert reopened(project / "runs" / "deep" / "second") == str(project / "runs" / "first")


def test_an_absolute_path_stays(project):
  given = str(project / "runs" / "first")
  make_run("runs/second", stages_from=given)
  assert json.loads((project / "runs/second/config.json").read_text())["stages_from"] == given


def test_a_run_that_is_gone_is_named_as_it_was_given(project):
  with pytest.raises(UserError, match="stages_from = 'runs/none' holds no run"):
    make_run("runs/second", stages_from="runs/none")
  make_run("runs/second", stages_from="runs/first")
  (project / "runs" / "first" / "config.json").unlink()
  with pytest.raises(UserError, match="stages_from = '../first' holds no run"):
    reopened("runs/second")


# ------------------------------------------------------------- a borrower that is borrowed from

STAGES = ("data", "teacher", "trajectories", "causal_init")


def places(run) -> list[str]:
  """The run in which each stage lies, by the name of its folder."""
  return [os.path.basename(os.path.realpath(run.directory(stage).parent)) for stage in STAGES]


@pytest.fixture
def chain(project):
  """second has all but the causal init from first, third all but the distillation from second."""
  for stage in ("teacher", "causal_init"):
    pretend("runs/first", stage, 4)
  make_run("runs/second", stages_from="runs/first", causal_init__steps=3)
  pretend("runs/second", "causal_init", 3)
  return project


def test_a_stage_is_found_where_it_was_made(chain, monkeypatch):
  run = make_run("runs/third", stages_from="runs/second", causal_init__steps=3, distill__lr=0.5)
  assert places(run) == ["first", "first", "first", "second"]
  assert all(run.borrows(stage) for stage in STAGES) and not run.borrows("distill")
  run = make_run("runs/fourth", stages_from="runs/third", causal_init__steps=3)
  assert places(run) == ["first", "first", "first", "second"]
  # all are moved, and read from elsewhere
  monkeypatch.chdir("/")
  moved = chain.rename(chain.parent / "moved")
  run = open_run(read_config(moved / "runs/fourth"), moved / "runs/fourth", save=False)
  assert places(run) == ["first", "first", "first", "second"]
  assert run.directory("teacher") == moved / "runs" / "first" / "teacher"


def test_only_stages_that_are_the_same_are_taken_on(chain):
  run = make_run("runs/third", stages_from="runs/second", causal_init__steps=9)
  assert places(run) == ["first", "first", "first", "third"]
  with pytest.raises(UserError, match="'runs/second' was made with another .*data.seed: 0 -> 1"):
    make_run("runs/other", stages_from="runs/second", data__seed=1)


def test_what_lies_with_the_lender_is_taken_from_there(chain):
  """As earlier versions did: it may have been made before that run named another one."""
  pretend("runs/second", "teacher", 6)
  run = make_run("runs/third", stages_from="runs/second", causal_init__steps=3)
  assert places(run) == ["first", "second", "first", "second"]
  for stage in ("data", "trajectories"):
    pretend("runs/second", stage, 1)
  shutil.rmtree("runs/first")
  run = make_run("runs/third", stages_from="runs/second", causal_init__steps=3)
  assert places(run) == ["second"] * 4


def test_a_run_that_is_gone_or_another_behind_the_lender_is_said(chain):
  given = {"stages_from": "runs/second", "causal_init__steps": 3}
  said = "stages_from = 'runs/second' takes stages of another run: stages_from = '.*first' was made"
  save_resolved(tiny_run.make_config(**EIGHT, teacher__lr=0.5), "runs/first")
  with pytest.raises(UserError, match=f"{said} with another config .*teacher.lr: 0.5"):
    make_run("runs/third", **given)
  shutil.rmtree("runs/first")
  said = "stages_from = 'runs/second' takes stages of another run: stages_from = '../first' holds"
  with pytest.raises(UserError, match=said):
    make_run("runs/third", **given)


def test_a_circle_is_refused(project):
  for name, lender in (("a", "b"), ("b", "a")):
    config = tiny_run.make_config(**EIGHT, stages_from=f"../{lender}")
    save_resolved(config, f"runs/{name}")
  with pytest.raises(UserError, match="round in a circle; give the run that made them"):
    make_run("runs/third", stages_from="runs/a")
  with pytest.raises(UserError, match="'runs/a' takes its own stages from runs/a, round in a"):
    make_run("runs/a", stages_from="runs/a")
