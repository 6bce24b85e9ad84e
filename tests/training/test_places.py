"""Weights that a config names by a relative path are the same from any folder, also after they were
moved with the run. The run that another takes stages from: test_borrowed.py.
"""

import json
import pathlib

import pytest

from experiments import wan_framepack
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.conversion import export
from hiar_jax.errors import UserError
from hiar_jax.training import places
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import open_run, read_config
from tests.helpers.small_weights import CONFIG, PARAMS
from tests.helpers.tiny_run import EIGHT, make_config, make_run, pretend

GIVEN = {"weights__base": "weights/x", "weights__teacher": "weights/y"}


@pytest.fixture
def project(tmp_path, monkeypatch):
  for name in ("x", "y"):
    (tmp_path / "project" / "weights" / name).mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "project")
  return tmp_path / "project"


def read(workdir) -> list[str]:
  """The weights of a run that is read."""
  given = open_run(read_config(workdir), workdir, save=False).experiment.weights
  return [given.base, given.teacher]


def stored(workdir) -> dict:
  return json.loads((pathlib.Path(workdir) / "config.json").read_text())["weights"]


def test_they_are_found_from_any_folder(project, monkeypatch):
  run = make_run("runs/a", **GIVEN)
  assert run.experiment.weights.base == "weights/x"  # as given, where it was given
  assert stored("runs/a") == {"base": "../../weights/x", "teacher": "../../weights/y"}
  (project / "other" / "weights" / "x").mkdir(parents=True)
  for folder in ("/", project / "runs", project / "other"):
    monkeypatch.chdir(folder)
    assert read(project / "runs/a") == [str(project / "weights" / x) for x in "xy"]
  # the command is given again from another folder, in which there is nothing of that name
  pretend(project / "runs/a", "teacher", 2)
  monkeypatch.chdir(project / "runs")
  again = make_run(project / "runs/a", **GIVEN)
  assert again.experiment.weights.base == str(project / "weights/x")
  # where there are others, they are not taken for those
  monkeypatch.chdir(project / "other")
  with pytest.raises(UserError, match="another config .*weights.base: .*project/weights/x"):
    make_run(project / "runs/a", **GIVEN)
  monkeypatch.chdir(project)
  make_run("runs/a", **{**GIVEN, "weights__base": str(project / "weights/x")})
  assert stored("runs/a")["base"] == str(project / "weights/x")


def test_they_may_be_moved_with_the_run(project, monkeypatch):
  make_run("runs/a", **GIVEN)
  monkeypatch.chdir("/")
  moved = project.rename(project.parent / "moved")
  (project / "weights" / "x").mkdir(parents=True)  # others, where they were
  assert read(moved / "runs/a")[0] == str(moved / "weights/x")


def test_what_an_earlier_version_stored_is_found_and_stays(project, monkeypatch):
  save_resolved(make_config(**EIGHT, **GIVEN), "runs/a")
  pretend("runs/a", "teacher", 2)
  before = stored("runs/a")
  make_run("runs/a", **GIVEN)
  assert stored("runs/a") == before and before["base"] == "weights/x"
  monkeypatch.chdir("/")
  assert read(project / "runs/a") == [str(project / "weights" / x) for x in "xy"]


def test_what_an_earlier_version_stored_elsewhere_is_stored_anew(project, tmp_path):
  save_resolved(make_config(**EIGHT, **GIVEN), tmp_path / "runs" / "a")
  assert read(tmp_path / "runs/a") == ["weights/x", "weights/y"]  # as they were typed
  make_run(tmp_path / "runs/a", **GIVEN)
  assert stored(tmp_path / "runs/a")["base"] == "../../project/weights/x"


def test_a_finished_run_may_do_without_them(project):
  make_run("runs/a", **GIVEN)
  pretend("runs/a", "teacher", 2)
  (project / "weights" / "x").rmdir()
  make_run("runs/a", **GIVEN)
  with pytest.raises(UserError, match="another config .*weights.base"):
    make_run("runs/a", **{**GIVEN, "weights__base": "weights/y"})


def test_weights_that_were_moved_are_told_by_their_fingerprints(project):
  for name in ("x", "y"):
    weights.save(f"weights/{name}", "dit", CONFIG, PARAMS)
  run = make_run("runs/a", **GIVEN)
  run.origins.keep()
  pretend("runs/a", "teacher", 2)
  with pytest.raises(UserError, match="another config .*weights.base"):
    make_run("runs/a", weights__base="weights/y", weights__teacher="weights/y")
  (project / "weights/x").rename(project / "weights/z")
  run = make_run("runs/a", weights__base="weights/z", weights__teacher="weights/y")
  run.check_origins()
  assert stored("runs/a")["base"] == "../../weights/z"


def test_a_borrower_may_name_them_otherwise(project, monkeypatch):
  make_run("runs/first", **GIVEN)
  monkeypatch.chdir(project / "runs")
  named = {"weights__base": "../weights/x", "weights__teacher": str(project / "weights/y")}
  run = make_run("second", stages_from="first", **named)
  assert run.borrows("teacher") and run.borrows("causal_init")
  assert stored("second")["base"] == "../../weights/x"


def test_every_field_that_names_converted_weights(project, monkeypatch):
  config = wan_framepack.get_config()
  config.weights = {"base": "weights/x", "teacher": "", "student": "weights/y"}
  config.codec.weights = config.text.weights = "weights/x"
  save_resolved(places.as_stored(config, "runs/a", None), "runs/a")
  for kind in ("vae", "umt5"):
    weights.save("weights/x", kind, CONFIG, PARAMS)
  monkeypatch.chdir("/")
  e = build(Experiment, places.located(read_config(project / "runs/a"), project / "runs/a", False))
  x, y = (str(project / "weights" / name) for name in "xy")
  assert [e.weights.base, e.weights.student, e.codec.weights, e.text.weights] == [x, y, x, x]
  assert e.weights.teacher == ""
  found = export._directories(project / "runs/a")
  assert {kind: str(place) for kind, place in found.items()} == {"vae": x, "umt5": x}


def test_a_home_stays_one(project, monkeypatch):
  monkeypatch.setenv("HOME", str(project))
  make_run("runs/a", weights__base="~/weights/x")
  assert stored("runs/a")["base"] == "~/weights/x"
  assert read("runs/a")[0] == str(project / "weights/x")
