"""Every value of a config is checked before the first stage."""

import re

import pytest

from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.training import samples, stages
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run
from tests.helpers.tiny_run import EIGHT, make_run

# What an experiment cannot be, for any use -> what the line says.
VALUES = {
  "teacher__lr=nan": "teacher: lr = nan: expected more than 0, finite",
  "teacher__shift=0.0": "teacher: shift = 0.0: expected more than 0",
  "teacher__caption_dropout=2.0": "teacher: caption_dropout = 2.0: expected 0 to 1",
  "teacher__openings=-0.5": "teacher: openings = -0.5: expected 0 to 1",
  "causal_init__b1=1.5": "causal_init: b1 = 1.5: expected at least 0 and less than 1",
  "distill__critic_lr=0.0": "distill: critic_lr = 0.0: expected more than 0",
  "distill__guidance=inf": "distill: guidance = inf: expected a finite number",
  "distill__score_shift=0.0": "distill: score_shift = 0.0: expected more than 0",
  "distill__score_high=2.0": "distill: score_high = 2.0: expected 0 to 1",
  "distill__score_low=0.99": "distill: score_low = 0.99, score_high = 0.98: expected a range",
  "student__shift=-2.0": "student: shift = -2.0: expected more than 0",
  "trajectories__dtype=int8": "trajectories: dtype = 'int8': expected one of float32, float16",
  "trajectories__guidance=nan": "trajectories: guidance = nan: expected a finite number",
  "sample__length=0.0": "sample: length = 0.0: expected more than 0",
  "sample__fps=-8.0": "sample: fps = -8.0: expected more than 0",
  "sample__seed=2147483648": "sample: seed = 2147483648: expected 0 to 2147483647",
  "data__fps=0.0": "data: fps = 0.0: expected more than 0",
  "data__seed=-1": "data: seed = -1: expected 0 to 4294967295",
  "seed=4294967296": "seed = 4294967296: expected 0 to 4294967295",
  "seed=-10": "seed = -10: expected 0 to 4294967295",
  "mesh__min_shard=-1": "mesh: min_shard = -1: expected at least 0",
  "model__freq_dim=0": "freq_dim = 0: expected an even number, at least 2",
  "model__unroll=0": "unroll = 0: expected at least 1",
  "model__dtype=fp32": "dtype = 'fp32': expected one of float32, bfloat16",
}


def changes_of(text: str) -> dict:
  name, value = text.split("=")
  number = value.lstrip("-").replace(".", "", 1)
  if number.isdigit() or number in ("nan", "inf"):
    return {name: int(value) if number == value.lstrip("-") and number.isdigit() else float(value)}
  return {name: value}


@pytest.mark.parametrize("given", VALUES)
def test_a_value_that_cannot_be_is_one_line(given):
  with pytest.raises(UserError, match=re.escape(VALUES[given])):
    build(Experiment, tiny_run.make_config(**changes_of(given)))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"distill__critic_warmup": 6}, "critic_warmup = 6 of distill.steps = 6: the generator would"),
    (
      {"history__sink": 2, "history__sink_level": "clean"},
      "'clean' is trained at history.level = 'input' alone, not at 'output'",
    ),
    ({"model__attention": "cudnn"}, "model.attention = 'cudnn' is for GPUs, and the devices here"),
    ({"distill__ema_start": 3}, "distill.ema_start = 3: there are 3 updates to average"),
  ],
)
def test_what_alone_training_cannot_do(tmp_path, changes, message):
  """A video may be made so, and an earlier run of it may be read."""
  build(Experiment, tiny_run.make_config(**changes))
  with pytest.raises(UserError, match=re.escape(message)):
    make_run(tmp_path / "w", **changes)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  ("changes", "made", "shortest"),
  [
    ({}, 2, 1.01),  # of clips of four frames, in blocks of two
    ({"history__block": 4}, 4, 1.01),
    ({"data__frames": 18, "history__block": 3}, 3, 0.17),
    ({"data__frames": 18, "history__block": 6, "history__window": 6}, None, None),
  ],
)
def test_videos_too_short_to_be_measured(tmp_path, changes, made, shortest):
  """Before the first stage, with the shortest length that is not."""
  changes = {"history__window": 4, **changes}
  short = {**changes, "sample__length": 0.1}
  if made:
    said = f"videos of {made} frames, and measuring takes 5; give at least {shortest}"
    with pytest.raises(UserError, match=f"^sample.length = 0.1: {said}$"):
      make_run(tmp_path / "w", **short)
    assert not (tmp_path / "w").exists()
    with pytest.raises(UserError, match="measuring takes 5"):
      make_run(tmp_path / "w", **changes, sample__length=shortest - 0.01)
  run = make_run(tmp_path / "w", **changes, sample__length=shortest or 0.1)
  assert samples.long_frames(run) >= 5
  # without a truth nothing is measured that takes as many
  films = {"data__source": "videos", "data__folder": str(tmp_path)}
  assert samples.long_frames(make_run(tmp_path / "x", **short, **films)) == (made or 6)


def test_a_warm_up_that_never_ends_is_said(tmp_path, capfd):
  make_run(tmp_path / "w", teacher__warmup=5, causal_init__warmup=4, distill__warmup=2)
  said = "note: causal_init.warmup = 4 of 4 updates: the learning rate never reaches its peak"
  assert capfd.readouterr().err.splitlines() == [said]
  # the generator's updates are fewer than the steps
  make_run(tmp_path / "x", teacher__warmup=5, causal_init__warmup=3, distill__warmup=3)
  assert "note: distill.warmup = 3 of 3 updates" in capfd.readouterr().err


def test_a_batch_is_compared_with_the_clips_of_a_folder(tmp_path, monkeypatch):
  """As soon as they are counted: before the teacher, and at the next start."""
  folder = tmp_path / "clips"
  tiny_run.write_clips(folder, 8)
  videos = {"data__source": "videos", "data__folder": str(folder), "sample__prompts": "held_out"}
  changes = {**videos, "distill__batch": 16, "distill__forward_kl__weight": 0.0}
  run = make_run(tmp_path / "w", **changes)
  with pytest.raises(UserError, match="distill.batch = 16 is more than the clips of .* = 8;"):
    stages.prepare_data(run)
  with pytest.raises(UserError, match="distill.batch = 16 is more than the clips of .* = 8;"):
    make_run(tmp_path / "w", **changes)


def test_frames_may_be_oblong():
  """Given by a fork, and by the command (tests/test_bad_input.py)."""
  config = tiny_run.make_config(**EIGHT, data__source="videos", data__folder="clips")
  config.data.size = (16, 24)
  data = build(Experiment, config).data
  assert (data.height, data.width) == (16, 24)
