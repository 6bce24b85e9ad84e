"""Every experiment builds in every variant, and a rival differs from shapes.py in its own lines
alone.
"""

import os
import runpy
import subprocess
import sys

import pytest
import setuptools

from hiar_jax.config.building import build
from hiar_jax.config.workdir import difference
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run

FILES = sorted((tiny_run.ROOT / "experiments").glob("shapes*.py"))
VARIANTS = ("main", "full", "smoke")
HISTORY = ("order", "level", "gradient", "window", "sink", "sink_level", "renoise")
# The fields in which each must differ from shapes.py; beyond them only those of the history may.
RIVALS = {
  "shapes_self_forcing": {"history.order", "history.level", "distill.forward_kl.weight"},
  "shapes_self_aligned": {
    "history.level",
    "history.gradient",
    "history.sink",
    "history.sink_level",
    "distill.forward_kl.weight",
  },
  "shapes_no_forward_kl": {"distill.forward_kl.weight"},
}


def load(path, variant: str):
  return runpy.run_path(str(path))["get_config"](variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds(path, variant):
  experiment = build(Experiment, load(path, variant))
  assert experiment.stages_from == "" and experiment.dit.channels == experiment.codec.channels
  # a video four times longer than anything that was trained on, where no end is planned and nothing
  # passes once
  planned = experiment.sample.order == "both_ends" or experiment.data.hidden
  assert experiment.sample.length >= 4 or planned
  # a kill loses no whole stage
  stages = ("framepack",) if experiment.framepack else ("causal_init", "distill")
  for stage in ("teacher", *stages):
    assert getattr(experiment, stage).steps >= 2 * experiment.log.checkpoint_every, stage


FORK = """
from hiar_jax.experiments import shapes

def get_config(variant="main"):
  c = shapes.get_config(variant)
  c.history.window = 9
  return c
"""


def test_a_fork_works_from_any_folder(tmp_path):
  """As README has it: hiar_jax is installed, experiments/ is not on the path."""
  (tmp_path / "mine.py").write_text(FORK)
  code = "import runpy; print(runpy.run_path('mine.py')['get_config']('smoke').history.window)"
  environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "hiar_jax").symlink_to(tiny_run.ROOT / "hiar_jax")
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.stdout == "9\n", done.stderr


def test_they_are_installed_with_the_package():
  packages = setuptools.find_namespace_packages(str(tiny_run.ROOT), include=["hiar_jax.*"])
  assert "hiar_jax.experiments" in packages


def test_the_method_of_shapes_is_hiar():
  method = build(Experiment, load(FILES[0], "main")).history
  assert (method.order, method.level, method.gradient, method.sink) == (
    "step_first",
    "output",
    "detached",
    0,
  )
  distill = build(Experiment, load(FILES[0], "main")).distill
  assert distill.critic_updates == 5 and distill.forward_kl.weight > 0


def test_every_rival_is_known():
  of_framepack = ("", "_both_ends", "_inverted", "_discrete")
  packed = {"shapes_hiar_packed", "shapes_screen"}
  packed |= {f"shapes_framepack{which}" for which in of_framepack}
  assert {path.stem for path in FILES} == {"shapes", *packed, *RIVALS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_differs_in_its_own_lines_alone(name, variant):
  first, rival = (
    load(tiny_run.ROOT / "experiments" / f"{stem}.py", variant) for stem in ("shapes", name)
  )
  differing = {line.partition(":")[0] for line in difference(first, rival)}
  assert RIVALS[name] <= differing
  allowed = (
    RIVALS[name]
    if name == "shapes_no_forward_kl"
    else RIVALS[name] | {f"history.{field}" for field in HISTORY}
  )
  assert differing <= allowed
  assert rival.distill.forward_kl.weight == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_clips_are_trained_as_shapes_are(variant):
  """With another source, a lapped code, and as many updates as fit: the method and the network are
  the same.
  """
  first, clips = (
    load(tiny_run.ROOT / "experiments" / f"{stem}.py", variant) for stem in ("shapes", "clips")
  )
  experiment = build(Experiment, clips)
  assert experiment.data.source == "videos" and experiment.codec.lapped
  assert experiment.data.height % experiment.codec.patch == 0
  differing = {line.partition(":")[0].partition(".")[0] for line in difference(first, clips)}
  stages = {"teacher", "trajectories", "causal_init", "distill"} if variant != "smoke" else set()
  assert differing <= {"data", "codec", "sample", "log", *stages}
  for stage in ("teacher", "causal_init", "distill"):
    getattr(experiment, stage).check_average(stage)


@pytest.mark.parametrize(
  ("variant", "remembers"), [("main", True), ("window", False), ("long", True)]
)
def test_what_passes_behind_the_screen_is_seen_on_both_sides(variant, remembers):
  """By a section and its history together, wherever the section lies, or nowhere."""
  experiment = build(Experiment, load(tiny_run.ROOT / "experiments" / "shapes_screen.py", variant))
  schedule = experiment.framepack.parsed
  spanned = schedule.generate + sum(group.frames for group in schedule.before)
  # the frames out of sight, and one of either side: for all of a section's frames, or for none
  hidden = experiment.data.hidden
  assert (spanned >= schedule.generate + hidden + 1) == remembers
  assert (spanned < hidden + 2) == (not remembers)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_what_comes_before_distillation_can_come_from_another_run(chain):
  """To the same student, bit for bit; the other run is read and left as it was."""
  workdir, before = chain.directory / "borrower", tiny_run.files(chain.straight)
  done = chain.train(workdir, stages_from=chain.straight)
  assert done.returncode == 0, done.stderr
  assert tiny_run.files(chain.straight) == before
  assert {path.name for path in workdir.iterdir()} == {
    "config.json",
    "distill",
    "logs",
    "origins",
    "sample",
  }
  tiny_run.assert_same_arrays(
    tiny_run.state(workdir, "distill", 6), tiny_run.state(chain.straight, "distill", 6)
  )
  tiny_run.assert_same_arrays(tiny_run.videos(workdir), tiny_run.videos(chain.straight))


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_takes_what_does_not_depend_on_its_method(chain, name):
  """Of causal inits, that of a method which sees the past alike."""
  workdir = chain.directory / name
  sink = (
    {"data__frames": 6, "history__block": 2, "history__window": 6, "history__sink": 2}
    if name == "shapes_self_aligned"
    else {}
  )
  first = chain.straight
  if sink:
    first = chain.directory / "first_of_six_frames"
    done = chain.train(first, **{**sink, "history__sink": 0})
    assert done.returncode == 0, done.stderr
  done = chain.train(workdir, config=f"experiments/{name}.py:smoke", stages_from=first, **sink)
  assert done.returncode == 0, done.stderr
  ours, theirs = tiny_run.state(first, "distill", 6), tiny_run.state(workdir, "distill", 6)
  assert any((ours[key] != theirs[key]).any() for key in ours if key.startswith("params"))
  assert len(tiny_run.videos(workdir)) == 3
  assert not (workdir / "teacher").exists() and not (workdir / "trajectories").exists()
  assert (workdir / "causal_init").exists() == (name != "shapes_no_forward_kl")


@pytest.mark.slow
def test_smoke_goes_through_every_stage(chain):
  workdir = chain.directory / "smoke"
  done = chain.python(
    "-m", "hiar_jax.train", "--config=experiments/shapes.py:smoke", f"--workdir={workdir}"
  )
  assert done.returncode == 0, done.stderr
  assert {record["stage"] for record in tiny_run.log(workdir)} == set(tiny_run.STAGES)
  assert (workdir / "sample" / "metrics.json").exists() and (
    workdir / "sample" / "contact_sheet.png"
  ).exists()
