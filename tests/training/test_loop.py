"""The training loop: what it logs, saves and previews, and when; how it stops and goes on."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax.checkpoints import training_state
from hiar_jax.errors import UserError
from hiar_jax.training import loop
from hiar_jax.training import state as states
from hiar_jax.training.log import read_log
from hiar_jax.training.pretrained import Start
from hiar_jax.training.run import Run
from hiar_jax.training.state import TrainConfig
from hiar_jax.training.updates import Stage, Update
from tests.helpers.tiny_run import make_run


class Counter:
  """1, 2, 3, ..."""

  def __init__(self):
    self.count = 0

  def get_state(self):
    return {"count": self.count}

  def set_state(self, state):
    self.count = state["count"]


class Feed(loop.DataIterators):
  """A counter's numbers and the loss of the step that takes each; `act` is called before it."""

  def __init__(self, loss=lambda step: 1.0 / step, act=lambda step: None):
    self.counter, self.loss, self.act = Counter(), loss, act
    super().__init__(None, feed=self.counter)

  def next(self, name):
    self.counter.count += 1
    step = self.counter.count
    self.act(step)
    return {name: np.float32(step), "loss": np.float32(self.loss(step))}


def train(run: Run, steps: int, preview=None, slow=None, starts=(), **feed) -> np.ndarray:
  """A stage whose state is the running sum of its feed; -> its averaged weights as saved last.

  slow: what the device calls with each loss. starts: as loop.run_stage.
  """
  run.__dict__.pop("writer", None)

  def step(state, batch, frozen):
    moved = {"w": state.params["w"] + batch["counts"]}
    state = state.replace(step=state.step + 1, params=moved, ema=jax.tree.map(jnp.copy, moved))
    loss = batch["loss"]
    if slow:
      loss = jax.pure_callback(slow, jax.ShapeDtypeStruct((), jnp.float32), loss)
    return state, {"loss": loss, "grad_norm": jnp.ones(())}

  first = {"w": jnp.zeros(3)}
  create = lambda first=first: states.create_state(jax.random.key(0), first, optax.sgd(1.0))
  with run.writer:
    loop.run_stage(
      run,
      Stage(
        "teacher",
        TrainConfig(steps=steps, batch=8, lr=0.1),
        create=create,
        rules=run.experiment.dit.sharding_rules,
        feeds={},
        updates=(Update(lambda mean: step, ("counts",)),),
      ),
      starts=starts,
      iterators=Feed(**feed),
      preview=preview,
    )
  return training_state.load_params(run.directory("teacher") / "checkpoints")["w"]


def logged(run: Run) -> list[int]:
  return [
    record["step"]
    for record in read_log(run.workdir / "logs" / "metrics.jsonl")
    if "scalars" in record
  ]


def saved(run: Run) -> list[int]:
  return sorted(
    int(path.name)
    for path in (run.directory("teacher") / "checkpoints").iterdir()
    if path.name.isdigit()
  )


def test_the_loop_logs_saves_and_previews_when_due(tmp_path):
  run, shown = (
    make_run(tmp_path, log__every=3, log__checkpoint_every=4, log__preview_every=5, log__keep=9),
    [],
  )
  clips = np.zeros((1, 2, 4, 4, 3), np.uint8)
  weights = train(run, steps=11, preview=lambda state: shown.append(int(state.step)) or clips)
  assert logged(run) == [3, 6, 9, 11]
  assert saved(run) == [4, 8, 11]
  assert shown == [5, 10, 11]
  np.testing.assert_array_equal(weights, np.full(3, 66.0))


def test_a_stage_starts_from_weights_that_it_loads_once_and_gives_up(tmp_path):
  run, loaded = make_run(tmp_path, log__checkpoint_every=2), []

  def load():
    loaded.append({"w": jnp.full(3, 5.0)})
    return loaded[-1]

  start = Start(jax.eval_shape(lambda: {"w": jnp.zeros(3)}), load)
  np.testing.assert_array_equal(train(run, 2, starts=[start]), np.full(3, 5.0 + 3.0))
  assert len(loaded) == 1 and loaded[0]["w"].is_deleted()
  np.testing.assert_array_equal(train(run, 4, starts=[start]), np.full(3, 5.0 + 10.0))
  assert len(loaded) == 1  # a checkpoint was there


def test_a_stage_goes_on_with_another_kernel_and_remat(tmp_path):
  weights = train(make_run(tmp_path, log__checkpoint_every=2), 2)
  np.testing.assert_array_equal(weights, np.full(3, 3.0))
  changed = make_run(tmp_path, model__attention="blockwise", model__remat="full")
  np.testing.assert_array_equal(train(changed, 3), np.full(3, 6.0))
  with pytest.raises(UserError, match="model.dim: "):
    train(make_run(tmp_path, model__dim=64, model__num_heads=1), 4)


def test_a_stop_between_updates_is_saved_and_gone_on_from(tmp_path, capfd):
  run = make_run(tmp_path, log__every=2, log__checkpoint_every=100)
  with pytest.raises(loop.Preempted) as stopped:
    train(run, steps=9, act=lambda step: step == 5 and os.kill(os.getpid(), signal.SIGTERM))
  assert stopped.value.code == 143
  assert (
    "teacher: stopped and saved at step 5; the same command goes on from there"
    in capfd.readouterr().err
  )
  assert saved(run) == [5] and logged(run) == [2, 4]
  np.testing.assert_array_equal(train(run, steps=9), np.full(3, 45.0))
  assert logged(run) == [2, 4, 6, 8, 9]


def test_updates_do_not_queue_up_before_a_slow_device(tmp_path):
  """So that a stop is answered within an update or two, however seldom the metrics are read."""
  run = make_run(tmp_path, log__every=100, log__checkpoint_every=100)
  ended, queued = [], []

  def slow(loss):
    time.sleep(0.05)
    ended.append(1)
    return loss

  train(run, steps=8, slow=slow, act=lambda step: queued.append(step - 1 - len(ended)))
  assert max(queued) == 1


def test_a_stop_in_the_last_update_stops_before_the_next_stage(tmp_path):
  run = make_run(tmp_path)
  with pytest.raises(loop.Preempted):
    train(run, steps=3, act=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
  assert loop.is_done(run, "teacher", 3) and logged(run) == [1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_no_number_ends_the_stage_and_is_not_saved(tmp_path, bad, log_every):
  run = make_run(tmp_path, log__every=log_every, log__checkpoint_every=4)
  with pytest.raises(
    UserError, match="teacher: loss is not finite at step 8; .* lower learning rate"
  ):
    train(run, steps=20, loss=lambda step: bad if step >= 8 else 1.0)
  assert saved(run) == [4]
  np.testing.assert_array_equal(
    training_state.load_params(tmp_path / "teacher" / "checkpoints")["w"], np.full(3, 10.0)
  )


def test_what_a_checkpoint_has_behind_it_is_in_the_log(tmp_path, monkeypatch):
  """Killed right after a save, nothing would write the lines before it again."""
  run, seen = make_run(tmp_path, log__every=1, log__checkpoint_every=3), []
  save = training_state.Checkpoints.save
  monkeypatch.setattr(
    training_state.Checkpoints,
    "save",
    lambda self, step, *a, **k: seen.append((step, logged(run)[-1])) or save(self, step, *a, **k),
  )
  train(run, steps=7)
  assert seen == [(3, 3), (6, 6), (7, 7)]


def test_several_feeds_are_restored_as_one():
  a, b = Counter(), Counter()
  iterators = loop.DataIterators(None, prompts=a, trajectories=b)
  a.count, b.count = 3, 5
  kept = iterators.get_state()
  a.count = b.count = 0
  iterators.set_state(kept)
  assert (a.count, b.count) == (3, 5)


def test_a_stage_is_done_when_its_last_checkpoint_is_whole(tmp_path):
  run = make_run(tmp_path)
  assert not loop.is_done(run, "teacher", 4)
  train(run, steps=4)
  assert loop.is_done(run, "teacher", 4) and not loop.is_done(run, "teacher", 5)
  files = (
    p for p in (tmp_path / "teacher" / "checkpoints" / "4" / "state").rglob("*") if p.is_file()
  )
  biggest = max(files, key=lambda p: p.stat().st_size)
  biggest.write_bytes(biggest.read_bytes()[:-1])
  assert not loop.is_done(run, "teacher", 4)


def test_borrowed_stages_must_be_done(tmp_path):
  first = make_run(tmp_path / "first")
  second = make_run(tmp_path / "second", stages_from=str(tmp_path / "first"))
  train(first, steps=4)
  assert loop.is_done(second, "teacher", 4)
  with pytest.raises(UserError, match="its teacher is not there, not finished or damaged"):
    loop.is_done(second, "teacher", 6)
  assert not loop.is_done(second, "distill", 6)
