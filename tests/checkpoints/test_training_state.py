"""A checkpoint comes back bit for bit, on any devices, after any kill; what does not fit or is
damaged says so.
"""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import optax
import pytest

from hiar_jax.checkpoints import stored_arrays, training_state
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import UserError

CONFIG = {"width": 16, "heads": {"count": 2}, "levels": (1.0, 0.5)}
OPTIMIZER = optax.adamw(1e-2)


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  ema: Any
  opt: Any
  key: jax.Array


def make(width: int = 16, ema: bool = False) -> State:
  params = {
    "in": {"kernel": jnp.arange(8.0 * width).reshape(8, width)},
    "out": jnp.ones((width,), jnp.bfloat16),
  }
  return State(
    jnp.int32(0), params, params if ema else None, OPTIMIZER.init(params), jax.random.key(7)
  )


def advance(state: State) -> State:
  key = jax.random.fold_in(state.key, state.step)
  gradient = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), state.params)
  update, opt = OPTIMIZER.update(gradient, state.opt, state.params)
  return state.replace(
    step=state.step + 1, params=optax.apply_updates(state.params, update), opt=opt
  )


def numbers(state: Any) -> list[np.ndarray]:
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(numbers(a), numbers(b), strict=True):
    np.testing.assert_array_equal(x, y)


def placed(state: State, devices: int) -> State:
  """The state with its matrices split over the devices and everything else on each of them."""
  mesh = jax.make_mesh(
    (devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )
  spec = lambda x: jax.P("fsdp") if x.ndim == 2 else jax.P()
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)


def loader() -> grain.DatasetIterator:
  return iter(grain.MapDataset.range(100).shuffle(seed=3).batch(4).to_iter_dataset())


def save_steps(directory: pathlib.Path, steps: int, **kwargs: Any) -> list[State]:
  states = [advance(make())]
  with Checkpoints(directory, config=CONFIG, **kwargs) as checkpoints:
    for step in range(1, steps + 1):
      assert checkpoints.save(step, states[-1], states[-1].params)
      states.append(advance(states[-1]))
  return states  # states[i] is the one of step i + 1


# --------------------------------------------------------------------------------------- round trip


def test_an_empty_directory_restores_nothing(tmp_path):
  with Checkpoints(tmp_path / "new", config=CONFIG) as checkpoints:
    assert checkpoints.restore(make()) is None
    assert checkpoints.latest_step() is None


def test_a_resumed_run_equals_a_straight_one(tmp_path):
  """State (typed key, optax state, None leaf) and data iterator: four steps, or two, a restart and
  two.
  """

  def run(state, iterator, steps):
    seen = []
    for _ in range(steps):
      seen.append(next(iterator))
      state = advance(state)
    return state, seen

  straight, batches = run(make(), loader(), 4)

  iterator = loader()
  state, _ = run(make(), iterator, 2)
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    checkpoints.save(2, state, state.params, iterator)
    next(iterator)  # what comes after save() belongs to the next checkpoint

  iterator = loader()
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore(jax.eval_shape(make), iterator)
  assert step == 2
  resumed, rest = run(state, iterator, 2)
  assert_same(resumed, straight)
  np.testing.assert_array_equal(rest, batches[2:])


def test_any_iterator_with_get_state_and_set_state_is_kept(tmp_path):
  class Counter:
    position = 3

    def get_state(self):
      return {"position": self.position}

    def set_state(self, state):
      self.position = state["position"]

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make(), make().params, Counter())
    other = Counter()
    other.position = 0
    checkpoints.restore(make(), other)
  assert other.position == 3


def test_a_position_that_does_not_fit_the_data_says_so(tmp_path):
  class Shorter:
    def get_state(self):
      return {}

    def set_state(self, state):
      raise ValueError("position 9 of 3 clips")

  save_steps(tmp_path, 1)
  message = (
    r"the position in the data does not fit this data pipeline \(.*\); use the data settings"
  )
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    with pytest.raises(UserError, match=message):  # it was saved without one
      checkpoints.restore(make(), loader())
    checkpoints.save(2, make(), make().params, loader())
    with pytest.raises(UserError, match=r"\(position 9 of 3 clips\)"):
      checkpoints.restore(make(), Shorter())
  assert (tmp_path / "2").is_dir()


@pytest.mark.parametrize("saved, restored", [(8, 2), (2, 8), (4, 1)])
def test_another_number_of_devices_restores_the_same_numbers(tmp_path, saved, restored):
  state = placed(advance(make()), saved)
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    checkpoints.save(1, state, state.params)
    _, there = checkpoints.restore(placed(make(), restored))
  assert_same(there, state)
  assert len(there.params["in"]["kernel"].sharding.device_set) == restored
  assert there.params["in"]["kernel"].sharding.spec == jax.P("fsdp")


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path):
  step = jax.jit(advance, donate_argnums=0)
  state = step(make())
  expected = jax.tree.map(jnp.copy, state)
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    checkpoints.save(1, state, state.params)
    for _ in range(20):
      state = step(state)
    _, there = checkpoints.restore(jax.eval_shape(make))
  assert_same(there, expected)


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
  states = save_steps(tmp_path, 4, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    assert not checkpoints.save(4, states[0], states[0].params)
    step, state = checkpoints.restore(make())
  assert step == 4
  assert_same(state, states[3])


# ---------------------------------------------------------------------------- weights for inference


def test_weights_and_config_load_without_the_state(tmp_path):
  states = save_steps(tmp_path, 2)
  assert_same(training_state.load_params(tmp_path), states[1].params)
  assert_same(training_state.load_params(tmp_path, step=1), states[0].params)
  assert training_state.load_config(tmp_path) == {
    "width": 16,
    "heads": {"count": 2},
    "levels": [1.0, 0.5],
  }
  half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), states[1].params)
  assert training_state.load_params(tmp_path, half)["in"]["kernel"].dtype == jnp.bfloat16


def test_weights_that_are_not_there(tmp_path):
  with pytest.raises(UserError, match="no such directory"):
    training_state.load_params(tmp_path / "absent")
  with pytest.raises(UserError, match=r"no checkpoint in .* steps there: none"):
    training_state.load_params(tmp_path)
  save_steps(tmp_path, 2)
  with pytest.raises(UserError, match=r"no checkpoint of step 7 .* steps there: \[1, 2\]"):
    training_state.load_params(tmp_path, step=7)
  wide = jax.eval_shape(lambda: make(32))
  with pytest.raises(
    UserError, match=r"params in/kernel is float32\[8, 16\] in it, float32\[8, 32\] here"
  ):
    training_state.load_params(tmp_path, wide.params)


# ------------------------------------------------------------------------------------- does not fit


@pytest.mark.parametrize(
  "config, message",
  [
    ({**CONFIG, "width": 32}, r"\(stored -> given: width: 16 -> 32\)"),
    ({**CONFIG, "heads": {"count": 4}}, r"heads\.count: 2 -> 4"),
    ({**CONFIG, "depth": 2}, r"depth: \(none\) -> 2"),
  ],
)
def test_another_config_names_the_field(tmp_path, config, message):
  save_steps(tmp_path, 1)
  with Checkpoints(tmp_path, config=config) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(make())
  assert (tmp_path / "1").is_dir()


@pytest.mark.parametrize(
  "state, message",
  [
    (
      lambda: make(width=32),
      r"state opt/0/mu/in/kernel is float32\[8, 16\] in it, float32\[8, 32\] here",
    ),
    (lambda: make(ema=True), r"state ema/in/kernel is absent in it, float32\[8, 16\] here"),
    (
      lambda: make().replace(params={}),
      r"state params/in/kernel is float32\[8, 16\] in it, absent here",
    ),
    (
      lambda: make().replace(step=jnp.float32(0)),
      r"state step is int32\[\] in it, float32\[\] here",
    ),
  ],
)
def test_another_tree_names_the_first_path(tmp_path, state, message):
  save_steps(tmp_path, 1)
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints, pytest.raises(UserError, match=message):
    checkpoints.restore(jax.eval_shape(state))
  assert (tmp_path / "1").is_dir()


# ------------------------------------------------------------------------------------------- damage


def biggest(directory: pathlib.Path, pattern: str = "*") -> pathlib.Path:
  return max((p for p in directory.rglob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x55
  path.write_bytes(content)


DAMAGES = {
  "a bit": lambda d: flip(biggest(d / "state" / "ocdbt.process_0")),
  "a truncated file": lambda d: os.truncate(biggest(d / "state"), 10),
  "a lost file": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
  "a lost config": lambda d: (d / "config" / "metadata").unlink(),
  "torn checksums": lambda d: os.truncate(d / "checksums.json", 20),
  "a lost item, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    (d / "state" / "_METADATA").unlink(),
  ],
  "a lost config, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    (d / "config" / "metadata").unlink(),
  ],
  "torn metadata, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    os.truncate(d / "state" / "_METADATA", 50),
  ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
  tmp_path, capfd, damage
):
  states = save_steps(tmp_path, 2)
  DAMAGES[damage](tmp_path / "2")
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore(make())
    assert step == 1
    assert_same(state, states[0])
    message = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(message) == 1 and message[0].startswith(f"checkpoint {tmp_path}/2 is damaged (")
    # Training reaches step 2 again and saves it.
    assert checkpoints.save(2, states[1], states[1].params)
    assert_same(checkpoints.restore(make())[1], states[1])
  assert (tmp_path / "2.damaged").is_dir()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "2.damaged"]


def test_weights_for_inference_come_from_the_checkpoint_before_a_damaged_one(tmp_path, capfd):
  states = save_steps(tmp_path, 2)
  flip(biggest(tmp_path / "2" / "params" / "ocdbt.process_0"))
  assert_same(training_state.load_params(tmp_path), states[0].params)
  assert f"checkpoint {tmp_path}/2 is damaged" in capfd.readouterr().err
  assert (tmp_path / "2").is_dir()  # reading changes nothing


def test_when_all_are_damaged_it_stops_every_time(tmp_path):
  save_steps(tmp_path, 2)
  for step in "12":
    os.truncate(biggest(tmp_path / step / "state"), 10)
  for _ in range(2):
    with (
      Checkpoints(tmp_path, config=CONFIG) as checkpoints,
      pytest.raises(UserError, match="every checkpoint"),
    ):
      checkpoints.restore(make())
  with pytest.raises(UserError, match="every checkpoint in .* damaged"):
    training_state.load_params(tmp_path)


# ---------------------------------------------------------------------------------- kill, full disk

WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests import conftest
from tests.checkpoints import test_training_state as t
from hiar_jax.checkpoints.training_state import Checkpoints

state = t.make(width=4096)
with Checkpoints({directory!r}, config=t.CONFIG) as checkpoints:
  found = checkpoints.restore(t.jax.eval_shape(lambda: t.make(width=4096)))
  step, state = found or (0, state)
  print("at", step, flush=True)
  for step in range(step + 1, 100000):
    state = state.replace(step=t.jnp.int32(step))
    checkpoints.save(step, state, state.params)
    print(step, flush=True)
"""


def killed(directory: pathlib.Path, saves: int, delay: float) -> tuple[int, int]:
  """Kills the writer `delay` seconds into its save number `saves`; -> the step it resumed at, the
  last it had saved.
  """
  root = pathlib.Path(__file__).parents[2]
  code = WRITER.format(root=str(root), directory=str(directory))
  process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
  resumed, saved = int(process.stdout.readline().split()[1]), 0
  for line in process.stdout:
    saved = int(line) - 1  # save() waits for the one before
    if int(line) == resumed + saves:
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)  # the loop ends where the pipe does
  process.stdout.close()
  process.wait()
  return resumed, saved


def test_sigkill_inside_a_write_loses_nothing_that_was_complete(tmp_path):
  saved = 0
  for saves, delay in [(2, 0.0), (3, 0.02), (2, 0.05)]:
    resumed, done = killed(tmp_path, saves, delay)
    assert resumed >= saved
    assert done >= resumed + saves - 1  # it was killed where the test means to
    saved = done
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore(jax.eval_shape(lambda: make(width=4096)))
  assert step >= saved > 0
  assert int(state.step) == step  # the numbers are those of that step
  assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob("*.damaged"))


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 4 MiB, where this process may mount one."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip("may not mount a file system here")
  yield disk
  subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(small_disk, monkeypatch, foreseen):
  """Refused before anything is written; or, where somebody else fills the disk meanwhile, by the
  threads that write.
  """
  small = make()
  big = jax.random.normal(jax.random.key(0), (2048, 1024))  # 8 MB that do not compress
  if not foreseen:
    monkeypatch.setattr(
      training_state.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**40)
    )
  with Checkpoints(small_disk / "c") as checkpoints:
    checkpoints.save(1, small, small.params)
    checkpoints.wait()
    before = tree_of(small_disk)
    with pytest.raises(
      UserError, match="no space left on the disk of .*; the last complete checkpoint is 1; "
    ):
      checkpoints.save(2, small, {"w": big})
      assert not foreseen
      checkpoints.wait()
    assert not foreseen or tree_of(small_disk) == before
    step, state = checkpoints.restore(make())
    assert step == 1
    assert_same(state, small)
  with (
    pytest.raises(UserError, match="no space left"),
    Checkpoints(small_disk / "c") as checkpoints,
  ):
    checkpoints.save(2, small, {"w": big})  # unforeseen, the end of the `with` is where it shows
  with Checkpoints(small_disk / "c") as checkpoints:  # as after a restart
    assert checkpoints.latest_step() == 1
    assert checkpoints.save(2, small, small.params)
    assert checkpoints.restore(make())[0] == 2


def tree_of(directory) -> set[str]:
  return {str(path) for path in directory.rglob("*")}


def test_a_disk_that_fills_up_in_the_background_is_one_line_too(tmp_path, monkeypatch, caplog):
  state = make()

  def full(path):
    raise OSError(errno.ENOSPC, "No space left on device")

  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, state.params)
    checkpoints.wait()
    with monkeypatch.context() as patch:
      # the last thing that Orbax's thread does before the rename
      patch.setattr(training_state.checksums, "write", full)
      checkpoints.save(2, state, state.params)
      with pytest.raises(
        UserError, match="no space left on the disk of .*; the last complete checkpoint is 1; "
      ):
        checkpoints.wait()
    assert "Traceback" not in caplog.text
    assert checkpoints.latest_step() == 1
    assert checkpoints.restore(make())[0] == 1
    assert checkpoints.save(2, state, state.params)  # there is space again
    assert checkpoints.restore(make())[0] == 2


def test_a_full_disk_is_told_from_its_cause():
  error = ValueError("INTERNAL: writing: No space left on device")
  assert stored_arrays.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
  assert stored_arrays.is_disk_full(error)
  wrapped = RuntimeError("save failed")
  wrapped.__cause__ = error
  assert stored_arrays.is_disk_full(wrapped)
  assert not stored_arrays.is_disk_full(OSError(errno.EACCES, "Permission denied"))
