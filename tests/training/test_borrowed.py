"""`stages_from` leads to the same run from any folder, also after both were moved.

What is borrowed: test_stages.py.
"""

import json
import os

import pytest

from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.training.run import open_run, read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_run import EIGHT, make_run


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
