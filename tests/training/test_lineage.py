"""Which stages another run's may stand for, what of a config may still be changed, and a stage that
is trained longer.
"""

import json
import shutil

import pytest

from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.training import updates
from hiar_jax.training.run import read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_run import EIGHT, make_run, pretend

ALL = ("data", "teacher", "trajectories", "causal_init")


# ------------------------------------------------------------------------------------- stages_from


@pytest.mark.parametrize(
  ("changes", "borrowed"),
  [
    ({"distill__seed": 1, "distill__steps": 9}, ALL),
    ({"weights__teacher": "elsewhere"}, ALL),
    ({"causal_init__steps": 9}, ALL[:3]),
    ({"causal_init__seed": 1}, ALL[:3]),
    ({"history__block": 4, "history__window": 4}, ALL[:3]),
    ({"trajectories__guidance": 2.0}, ALL[:2]),
    ({"student__shift": 3.0}, ALL[:2]),
    ({"teacher__lr": 0.5}, ALL[:1]),
    ({"seed": 1}, ALL[:1]),
  ],
)
def test_what_comes_before_the_first_difference_is_borrowed(tmp_path, capfd, changes, borrowed):
  save_resolved(tiny_run.make_config(**EIGHT), tmp_path / "first")
  run = make_run(tmp_path / "second", stages_from=str(tmp_path / "first"), **changes)
  assert run.taken.stages == borrowed
  for stage in ALL:
    place = tmp_path / ("first" if stage in borrowed else "second")
    assert run.directory(stage) == place / stage
  said = capfd.readouterr().err
  if borrowed == ALL:
    assert "stages_from" not in said
  else:
    field = next(iter(changes)).replace("__", ".")
    assert f"{', '.join(borrowed)} from there; what comes after is made here" in said
    assert f"(stored -> given: {field}: " in said


def test_what_was_borrowed_must_stay_what_it_is(tmp_path):
  """Where the other run is changed, this one does not begin to train what it had from there."""
  save_resolved(tiny_run.make_config(**EIGHT), tmp_path / "first")
  changes = {"stages_from": str(tmp_path / "first"), "causal_init__steps": 9}
  make_run(tmp_path / "second", **changes)
  pretend(tmp_path / "second", "causal_init", 9)
  assert make_run(tmp_path / "second", **changes).taken.stages == ALL[:3]
  save_resolved(tiny_run.make_config(**EIGHT, teacher__lr=0.5), tmp_path / "first")
  with pytest.raises(UserError, match="was made with another config .*teacher.lr: 0.5 -> "):
    make_run(tmp_path / "second", **changes)


def test_a_default_that_is_written_down_is_no_difference(tmp_path):
  config = tiny_run.make_config(**EIGHT)
  with config.unlocked():
    config.teacher.openings = 0.0
    del config.history.order
  save_resolved(config, tmp_path / "first")
  assert make_run(tmp_path / "second", stages_from=str(tmp_path / "first")).taken.stages == ALL


def test_a_stage_draws_by_a_seed_of_its_own(tmp_path):
  ours, theirs = (make_run(tmp_path / str(seed), distill__seed=seed) for seed in (None, 1))
  key = lambda run, stage: updates.stage_key(run.experiment, stage)
  assert key(ours, "distill") != key(theirs, "distill")
  assert key(ours, "teacher") == key(theirs, "teacher")
  other = make_run(tmp_path / "other", seed=1)
  assert key(other, "distill") == key(theirs, "distill")


# ---------------------------------------------------------------------------------- another config


def test_what_no_stage_has_read_may_be_changed(tmp_path, capfd):
  make_run(tmp_path)
  make_run(tmp_path, data__seed=1, teacher__lr=0.5)  # nothing is there
  said = "another config (before -> now): data.seed: 0 -> 1; teacher.lr: "
  assert said in capfd.readouterr().err
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "recipe.json").write_text("{}")
  make_run(tmp_path, data__seed=1, teacher__lr=0.25)
  with pytest.raises(UserError, match=r"another config \(stored -> given: data.seed: 1 -> 0\)"):
    make_run(tmp_path, teacher__lr=0.25)
  pretend(tmp_path, "teacher", 2)
  make_run(tmp_path, data__seed=1, teacher__lr=0.25, distill__lr=0.125)
  assert read_config(tmp_path).distill.lr == 0.125
  with pytest.raises(UserError, match=r"config \(stored -> given: teacher.lr: 0.25 -> 0.75\)"):
    make_run(tmp_path, data__seed=1, teacher__lr=0.75, distill__lr=0.125)
  assert not [*tmp_path.glob("config.*-*.json")]


# ----------------------------------------------------------------------------------------- --extend


@pytest.fixture
def finished(tmp_path):
  """As if it had gone through every stage."""
  make_run(tmp_path)
  for stage, step in {"teacher": 6, "causal_init": 4, "distill": 6}.items():
    pretend(tmp_path, stage, step)
  (tmp_path / "sample").mkdir()
  (tmp_path / "sample" / "metrics.json").write_text("{}")
  return tmp_path


def test_a_finished_run_is_trained_longer_where_that_is_said(finished, capfd):
  longer = {"distill__steps": 9, "distill__lr": 0.5, "distill__critic_lr": 0.25}
  with pytest.raises(UserError, match="use another --workdir, .*; --extend trains distill on"):
    make_run(finished, **longer)
  capfd.readouterr()
  make_run(finished, extend=True, **longer)
  said = capfd.readouterr().err
  assert "goes on after distill-6 with another config (before -> now): " in said
  kept = [finished / name for name in ("config.distill-6.json", "sample.distill-6")]
  assert f"kept of before: {kept[0]}, {kept[1]}\n" in said
  assert read_config(finished).distill.steps == 9
  # what describes the run until then is kept, and samples will be made anew
  assert json.loads((finished / "config.distill-6.json").read_text())["distill"]["steps"] == 6
  assert (finished / "sample.distill-6" / "metrics.json").exists()
  assert not (finished / "sample").exists()
  # the same command goes on, with the flag or without
  for extend in (True, False):
    make_run(finished, extend=extend, **longer)
  assert len([*finished.glob("config.*.json")]) == 1


def test_samples_that_are_not_made_again_are_said(finished, capfd):
  make_run(finished, log__every=7)
  assert "samples" not in capfd.readouterr().err
  said = (
    "note: the samples are there, as they were made before (sample.length: 4.0 -> 8.0); remove "
  )
  for _ in range(2):  # at every start
    make_run(finished, sample__length=8.0, log__every=9)
    assert f"{said}{finished}/sample to make others" in capfd.readouterr().err
    stored = read_config(finished)
    assert stored.sample.length == 4.0 and stored.log.every == 9
  shutil.rmtree(finished / "sample")
  make_run(finished, sample__length=8.0)
  assert "samples" not in capfd.readouterr().err and read_config(finished).sample.length == 8.0


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"distill__steps": 5}, "distill is at step 6; give --config.distill.steps of more than 6"),
    ({"distill__lr": 0.5}, "distill is at step 6; give --config.distill.steps of more than 6"),
    ({"teacher__steps": 9}, "teacher.steps: 6 -> 9: at a checkpoint of distill, the last stage"),
    ({"distill__steps": 9, "distill__b1": 0.5}, "b1: 0.0 -> 0.5; distill.steps: 6 -> 9: at a"),
  ],
)
def test_what_cannot_be_extended(finished, changes, message):
  with pytest.raises(UserError, match=f"^--extend: .*{message}|^--extend: {message}"):
    make_run(finished, extend=True, **changes)
  assert read_config(finished).distill.steps == 6 and (finished / "sample").exists()


def test_an_earlier_stage_is_extended_where_no_later_one_has_begun(finished):
  for stage in ("causal_init", "distill", "sample"):
    shutil.rmtree(finished / stage)
  make_run(finished, extend=True, teacher__steps=9)
  assert (finished / "config.teacher-6.json").exists()


@pytest.mark.slow
def test_an_extended_run_is_what_a_longer_one_would_have_been(tmp_path_factory, tmp_path):
  """Under a constant rate bit for bit; its videos are made anew."""
  chain = tiny_run.chain(tmp_path_factory.getbasetemp())
  constant = {"stages_from": chain.straight, "distill__schedule": "constant"}
  for name, steps, *flags in (("long", 8), ("short", 6), ("short", 8, "--extend")):
    done = chain.train(tmp_path / name, *flags, distill__steps=steps, **constant)
    assert done.returncode == 0, done.stderr
  long, short = (tiny_run.state(tmp_path / name, "distill", 8) for name in ("long", "short"))
  tiny_run.assert_same_arrays(long, short)
  assert tiny_run.log(tmp_path / "long") == tiny_run.log(tmp_path / "short")
  videos = [tiny_run.videos(tmp_path / name) for name in ("long", "short")]
  tiny_run.assert_same_arrays(*videos)
  other = dict(constant, distill__seed=1, distill__steps=8)
  assert chain.train(tmp_path / "other", **other).returncode == 0
  seeded = tiny_run.state(tmp_path / "other", "distill", 8)
  assert any((seeded[name] != long[name]).any() for name in long if name.startswith("params"))
