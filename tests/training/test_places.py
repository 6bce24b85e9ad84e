"""What a config names by a relative path is the same from any folder, also after it was moved with
the run: weights, films, prompts. The run that another takes stages from: test_borrowed.py.
"""

import json
import pathlib

import pytest

from experiments import wan_framepack
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.conversion import export
from hiar_jax.data import prompt_texts, tfds_builder, video_folder
from hiar_jax.data.sources import DataConfig
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


# ------------------------------------------------------------------------------- films and prompts


@pytest.fixture
def films(project):
  """A folder of films, named as a run names what it makes of them."""
  (project / "data").mkdir()
  for name in ("a.mp4", "b.mp4"):
    (project / "data" / name).write_bytes(name.encode())
  (project / "prompts.txt").write_text("a cat\n")
  return {"data__source": "videos", "data__folder": "data", "sample__prompts": "prompts.txt"}


def made(workdir, folder) -> None:
  """As if the data stage had gone through the folder."""
  cut = {**build(Experiment, read_config(workdir)).data.opened.recipe}
  tfds_builder.write_recipe(
    pathlib.Path(workdir) / "data", {**cut, "files": video_folder.fingerprint(folder)}
  )
  pretend(workdir, "teacher", 2)


def test_films_and_prompts_are_found_from_any_folder(project, films, monkeypatch):
  make_run("runs/a", **films)
  made("runs/a", project / "data")
  found = json.loads((project / "runs/a/config.json").read_text())
  assert found["data"]["folder"] == "../../data"
  assert found["sample"]["prompts"] == "../../prompts.txt"
  monkeypatch.chdir("/")
  for e in (
    open_run(read_config(project / "runs/a"), project / "runs/a", save=False).experiment,
    make_run(project / "runs/a", **films).experiment,  # the command as it was, from elsewhere
  ):
    assert [e.data.folder, e.sample.prompts] == [str(project / x) for x in ("data", "prompts.txt")]


def test_films_that_an_earlier_version_stored(project, films):
  save_resolved(make_config(**EIGHT, **films), "runs/a")  # data: not the run's own
  made("runs/a", project / "data")
  assert make_run("runs/a", **films).experiment.data.folder == "data"
  assert json.loads((project / "runs/a/config.json").read_text())["data"]["folder"] == "data"


def test_held_out_is_no_file(project, films):
  (project / "held_out").write_text("a cat\n")
  make_run("runs/a")
  assert json.loads((project / "runs/a/config.json").read_text())["sample"]["prompts"] == "held_out"


def test_films_that_were_moved_are_told_by_what_they_are(project, films, monkeypatch):
  make_run("runs/a", **films)
  made("runs/a", project / "data")
  with monkeypatch.context() as context:  # there may be many: they are not looked at for nothing
    context.setattr(video_folder, "fingerprint", lambda folder: pytest.fail("films were listed"))
    open_run(read_config("runs/a"), "runs/a", save=False)
  (project / "data").rename(project / "films")
  moved = {**films, "data__folder": str(project / "films")}
  assert make_run("runs/a", **moved).experiment.data.folder == str(project / "films")
  # a borrower may name them as it likes too
  assert make_run("runs/b", stages_from="runs/a", **{**films, "data__folder": "films"}).borrows(
    "data"
  )
  (project / "others").mkdir()
  (project / "others" / "a.mp4").write_bytes(b"another film")
  with pytest.raises(UserError, match="another config .*data.folder"):
    make_run("runs/a", **{**films, "data__folder": "others"})


def test_prompts_that_were_moved_are_told_by_what_they_are(tmp_path):
  (tmp_path / "a.txt").write_text("a cat\n")
  source = build(DataConfig, {"source": "prompts", "prompts": str(tmp_path / "a.txt")}).opened
  assert source.renamed(tmp_path / "data") == ()
  tfds_builder.write_recipe(tmp_path / "data", {"digest": prompt_texts.digest(["a cat"])})
  assert source.renamed(tmp_path / "data") == ("data.prompts",)
  (tmp_path / "a.txt").write_text("a dog\n")
  assert source.renamed(tmp_path / "data") == ()
