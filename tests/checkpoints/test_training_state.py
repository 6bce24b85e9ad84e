"""A checkpoint comes back bit for bit, on any devices; what does not fit says so."""

import grain
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import pytest

from hiar_jax.checkpoints import training_state
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import UserError
from tests.helpers.small_state import CONFIG, State, advance, assert_same, make, save_steps


def placed(state: State, devices: int) -> State:
  """The state with its matrices split over the devices and everything else on each of them."""
  mesh = jax.make_mesh(
    (devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )
  spec = lambda x: jax.P("fsdp") if x.ndim == 2 else jax.P()
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)


def loader() -> grain.DatasetIterator:
  return iter(grain.MapDataset.range(100).shuffle(seed=3).batch(4).to_iter_dataset())


# --------------------------------------------------------------------------------------- round trip


def test_an_empty_directory_restores_nothing(tmp_path):
  with Checkpoints(tmp_path / "new", config=CONFIG) as checkpoints:
    assert checkpoints.restore(make()) is None
    assert checkpoints.latest_step() is None


def test_fields_that_are_free_may_differ(tmp_path):
  described = lambda **changes: {"model": {"dim": 8, "remat": "none", **changes}, "stage": "a"}
  with Checkpoints(tmp_path, config=described()) as checkpoints:
    checkpoints.save(1, make(), make().params, loader())
  free = ("model.remat",)
  with Checkpoints(tmp_path, config=described(remat="full"), free=free) as checkpoints:
    assert checkpoints.restore(make())[0] == 1
  for changes, line in (({"dim": 16}, "model.dim: 8 -> 16"), ({"rem": 1}, "model.rem: ")):
    with (
      Checkpoints(tmp_path, config=described(**changes), free=free) as checkpoints,
      pytest.raises(UserError, match=line),
    ):
      checkpoints.restore(make())


def test_without_a_config_none_is_compared(tmp_path):
  (state, _) = save_steps(tmp_path, 1)
  with Checkpoints(tmp_path) as checkpoints:
    step, restored = checkpoints.restore(make())
  assert step == 1
  assert_same(restored, state)


def test_the_whole_state_is_read_as_it_is(tmp_path):
  """The weights that are not averaged; and the folder stays as it is."""
  states = save_steps(tmp_path, 2)
  before = sorted(tmp_path.rglob("*"))
  for step, state in ((None, states[1]), (1, states[0])):
    found = training_state.load_state(tmp_path, step)
    assert_same(found["params"], state.params)
    assert int(found["step"]) == int(state.step)
  assert sorted(tmp_path.rglob("*")) == before
  with pytest.raises(UserError, match="there is no checkpoint of step 7"):
    training_state.load_state(tmp_path, 7)


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


def test_any_iterator_with_grains_methods_is_kept(tmp_path):
  class Counter:
    position = 3

    def get_state(self):
      return str(self.position).encode()

    def set_state(self, state):
      self.position = int(state)

    def start_prefetch(self):
      pass

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
