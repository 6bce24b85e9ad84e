"""One named tree, the optimizer that moves it, and the average: alone, without a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax.errors import UserError
from hiar_jax.rollout import noise
from hiar_jax.training import state as states
from hiar_jax.training.distill import DistillConfig
from hiar_jax.training.state import TrainConfig, update_ema
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit


def training(**changes) -> TrainConfig:
  return TrainConfig(**{"steps": 10, "batch": 8, "lr": 0.1, **changes})


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"steps": 0}, "steps = 0: expected at least 1"),
    ({"batch": 0}, "batch = 0: expected at least 1"),
    ({"accumulate": 0}, "accumulate = 0: expected at least 1"),
    ({"lr": -1.0}, "^lr = -1.0: expected more than 0$"),
    ({"lr": float("inf")}, "^lr = inf: expected more than 0, finite$"),
    ({"muon_lr": 0.0}, "^muon_lr = 0.0: expected more than 0$"),
    ({"clip": -1.0}, "^clip = -1.0: expected at least 0$"),
    ({"weight_decay": float("nan")}, "^weight_decay = nan: expected at least 0, finite$"),
    ({"b2": 1.0}, "^b2 = 1.0: expected at least 0 and less than 1$"),
    ({"ema_decay": -0.1}, "^ema_decay = -0.1: expected at least 0 and less than 1$"),
    ({"warmup": -1}, "warmup = -1: expected at least 0"),
    ({"accumulate": 3}, "batch = 8 cannot be taken in accumulate = 3 equal parts"),
    ({"schedule": "linear"}, "schedule = 'linear': expected one of constant, cosine"),
    ({"decayed": "norms"}, "decayed = 'norms': expected one of all, kernels"),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(UserError, match=message):
    training(**changes)


def rates(optimizer, steps: int) -> list[float]:
  """The size of each update of AdamW on a constant gradient: its learning rate."""
  params, gradient = {"w": np.zeros(1, np.float32)}, {"w": np.ones(1, np.float32)}

  @quick_jit
  def updates():
    move = lambda opt_state, _: optimizer.update(gradient, opt_state, params)[::-1]
    return jax.lax.scan(move, optimizer.init(params), length=steps)[1]

  return (-np.asarray(updates()["w"])[:, 0]).tolist()


def test_the_rate_warms_up_and_stays():
  config = training(warmup=4, weight_decay=0.0)
  np.testing.assert_allclose(
    rates(config.optimizer(None), 7), [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], atol=1e-5
  )


def test_the_rate_falls_to_zero_over_the_stage_s_own_steps():
  config = training(warmup=2, schedule="cosine", weight_decay=0.0)
  assert rates(config.optimizer(None), 11)[2] == pytest.approx(0.1, rel=1e-4)
  assert rates(config.optimizer(None), 11)[10] == pytest.approx(0.0, abs=1e-6)
  assert rates(config.optimizer(None, steps=4), 5)[4] == pytest.approx(0.0, abs=1e-6)


def test_a_network_beside_the_main_one_has_its_own_rate():
  config = training(weight_decay=0.0)
  assert rates(config.optimizer(None, lr=0.3), 1) == [pytest.approx(0.3, rel=1e-4)]
  assert rates(config.optimizer(None, lr=0.0), 1) == [0.0]  # zero is a rate, not "as the others"


def test_clipping_is_by_the_global_norm_and_decay_pulls_to_zero():
  full = lambda count, value: np.full(count, value, np.float32)
  params, zero = {"a": full(3, 1), "b": full(4, 2)}, {"a": full(3, 0), "b": full(4, 0)}
  gradient = {"a": full(3, 300), "b": full(4, -400)}
  first = lambda optimizer, gradient: quick_jit(
    lambda gradient: optimizer.update(gradient, optimizer.init(params), params)
  )(gradient)
  _, opt_state = first(training(clip=1.0, weight_decay=0.0).optimizer(None), gradient)
  norm = np.sqrt(3 * 300**2 + 4 * 400**2)
  np.testing.assert_allclose(opt_state[1][0].mu["a"], 0.1 * 300 / norm, rtol=1e-5)
  np.testing.assert_allclose(opt_state[1][0].mu["b"], -0.1 * 400 / norm, rtol=1e-5)
  update, _ = first(training(weight_decay=0.5).optimizer(None), zero)
  np.testing.assert_allclose(update["b"], -0.1 * 0.5 * 2.0, rtol=1e-5)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_biases_need_not_decay(rule):
  params = tiny.params()
  zero = jax.tree.map(np.zeros_like, params)

  def moved(decayed):
    config = training(rule=rule, weight_decay=0.5, decayed=decayed)
    optimizer = config.optimizer(tiny.CONFIG)
    run = quick_jit(lambda zero: optimizer.update(zero, optimizer.init(params), params)[0])
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(run(zero)))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves if x.any()}

  names = moved("all")
  assert len(names) == len(jax.tree.leaves(params))
  kernels = {name for name in names if name.endswith("/kernel")}
  assert moved("kernels") == {
    name for name in kernels if rule == "adamw" or name.startswith("layers/")
  }


def test_a_clip_of_0_is_none():
  """And leaves the optimizer's state as it is, so that a run may go on so."""
  params, gradient = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 400.0)}
  without, clipped = (training(clip=clip).optimizer(None) for clip in (0.0, 1.0))
  _, opt_state = without.update(gradient, without.init(params), params)
  np.testing.assert_allclose(opt_state[1][0].mu["w"], 0.1 * 400, rtol=1e-5)
  assert jax.tree.structure(without.init(params)) == jax.tree.structure(clipped.init(params))


def test_muon_orthogonalises_the_momentum_of_each_layer_s_matrices():
  """Against singular vectors, in its second update: of momentum M = U S V', Nesterov's, it takes
  the rate times U V' with singular values near 1; all else of the network goes by AdamW.
  """
  config = training(rule="muon", muon_lr=0.02, lr=1e-3, clip=1e9, weight_decay=0.0)
  optimizer, start = config.optimizer(tiny.CONFIG), tiny.params()
  first, second = (jax.tree.map(lambda x, i=i: tiny.random(i, *x.shape), start) for i in (1, 2))
  update = quick_jit(optimizer.update)  # compiled once; op by op it would take longer
  _, opt_state = update(first, optimizer.init(start), start)
  moved, _ = update(second, opt_state, start)
  b, matrices = 0.95, 0  # optax's momentum
  for (path, step), g1, g2 in zip(
    jax.tree_util.tree_leaves_with_path(moved), *map(jax.tree.leaves, (first, second)), strict=True
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.startswith("layers/") and name.endswith("/kernel"):
      mean = b * g1 + g2
      for momentum, found in zip(b * mean / (1 - b**3) + g2 / (1 - b**2), step, strict=True):
        u, _, v = np.linalg.svd(momentum, full_matrices=False)
        rate = -config.muon_lr * max(1, found.shape[1] / found.shape[0]) ** 0.5
        along = u.T @ found @ v.T / rate
        assert np.abs(along - np.diag(np.diag(along))).max() < 0.02, name
        assert 0.6 < np.diag(along).min() and np.diag(along).max() < 1.3, name
        matrices += 1
    else:
      assert np.abs(step).max() < 3 * config.lr, name
  assert matrices == tiny.CONFIG.num_layers * 10  # q, k, v, o twice, and the MLP's two


def test_the_average_is_a_copy_until_it_starts_and_then_slows_down():
  config = training(ema_decay=0.5, ema_start=3)
  old, new = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
  # of the old average
  weight = lambda updates: 1 - float(update_ema(old, new, updates, config)["w"])
  assert [weight(n) for n in (0, 2)] == [0.0, 0.0]
  np.testing.assert_allclose([weight(n) for n in (3, 4, 5)], [1 / 10, 2 / 11, 3 / 12], rtol=1e-6)
  assert weight(1000) == pytest.approx(0.5)


def test_without_a_ramp_the_average_is_the_published_one():
  config = training(ema_decay=0.5, ema_start=3, ema_ramp=False)
  old, new = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
  found = [float(update_ema(old, new, n, config)["w"]) for n in (0, 2, 3, 4, 1000)]
  assert found == [1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("start", "fits"), [(0, True), (9, True), (10, False), (200, False)])
def test_an_average_that_never_starts_is_refused(start, fits):
  config = training(steps=10, ema_start=start)
  if fits:
    config.check_average("teacher")
  else:
    with pytest.raises(UserError, match=f"teacher.ema_start = {start}: there are 10 updates to"):
      config.check_average("teacher")


def test_the_generators_average_counts_its_own_updates():
  """Published: critic step 200, of which every fifth has one of the generator."""
  config = DistillConfig(steps=800, batch=8, lr=1.0, critic_lr=1.0, ema_start=160)
  assert config.averaged == 160
  with pytest.raises(UserError, match="distill.ema_start = 160: there are 160 updates to average"):
    config.check_average("distill")


@pytest.mark.parametrize(("b1", "dtype"), [(0.0, jnp.bfloat16), (0.9, jnp.float32)])
def test_without_momentum_the_first_moment_takes_half_the_memory(b1, dtype):
  """And moves the weights as float32 does."""
  params = {"w": jnp.asarray([1.0, -2.0])}
  gradients = [{"w": jnp.asarray(g)} for g in ([0.1, 0.2], [-0.3, 0.5], [0.7, 0.1])]
  config = training(b1=b1, lr=0.1, warmup=0, clip=1e9)
  rule = optax.adamw(0.1, b1=b1, b2=config.b2, weight_decay=config.weight_decay)
  found, ours, theirs = [], config.optimizer(tiny.CONFIG), optax.chain(optax.identity(), rule)
  for optimizer in (ours, theirs):
    at, state = params, optimizer.init(params)
    for gradient in gradients:
      moved, state = optimizer.update(gradient, state, at)
      at = optax.apply_updates(at, moved)
    found.append(at["w"])
    if optimizer is ours:
      assert {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {
        jnp.dtype(dtype)
      }
  np.testing.assert_array_equal(*found)


def quadratic(params, part):
  """Its gradient differs from example to example."""
  error = part["x"] @ params["w"] - part["y"]
  return (error**2).mean(), {"error": jnp.abs(error).mean()}


def batch(count: int = 8) -> dict:
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(count, 3)).astype(np.float32),
    "y": rng.normal(size=count).astype(np.float32),
  }


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_parts_of_a_batch_give_the_update_of_the_whole(accumulate):
  params, optimizer = {"w": np.ones(3, np.float32)}, optax.sgd(0.1)
  run = lambda parts: quick_jit(
    lambda params: states.apply_gradients(
      quadratic,
      params,
      optimizer.init(params),
      optimizer,
      batch(),
      accumulate=parts,
      mean=lambda x: x,
    )
  )(params)
  (one, _, metrics), (other, _, metrics_parts) = run(1), run(accumulate)
  np.testing.assert_allclose(one["w"], other["w"], rtol=1e-6)
  assert metrics.keys() == metrics_parts.keys() == {"loss", "error", "grad_norm"}
  for name, value in metrics.items():
    np.testing.assert_allclose(value, metrics_parts[name], rtol=1e-5, err_msg=name)


def test_the_mean_over_devices_is_taken_before_the_update():
  """Two devices with half a batch each: their mean is the update of the whole."""
  params, optimizer, whole = {"w": np.ones(3, np.float32)}, optax.sgd(0.1), batch()
  expected, _, metrics = quick_jit(
    lambda whole: states.apply_gradients(
      quadratic, params, optimizer.init(params), optimizer, whole, mean=lambda x: x
    )
  )(whole)
  halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), whole)
  mean = lambda tree: jax.lax.pmean(tree, "devices")
  step = lambda part: states.apply_gradients(
    quadratic, params, optimizer.init(params), optimizer, part, mean=mean
  )
  found, _, found_metrics = jax.device_get(quick_jit(jax.vmap(step, axis_name="devices"))(halves))
  for device in range(2):
    np.testing.assert_allclose(found["w"][device], expected["w"], rtol=1e-6)
    np.testing.assert_allclose(found_metrics["grad_norm"][device], metrics["grad_norm"], rtol=1e-5)


def test_an_example_s_draws_are_its_own():
  key = jax.random.key(3)
  all_of_them = noise.example_normal(noise.example_keys(key, jnp.arange(6)), (2, 3))
  some = noise.example_normal(noise.example_keys(key, jnp.array([4, 1])), (2, 3))
  np.testing.assert_array_equal(some, all_of_them[jnp.array([4, 1])])
  assert len(np.unique(np.asarray(all_of_them))) == 36


def test_a_fresh_state_is_complete():
  params, optimizer = {"w": jnp.ones(3)}, training().optimizer(None)
  alone = states.create_state(jax.random.key(0), params, optimizer)
  assert alone.critic is None and alone.critic_opt_state is None and int(alone.step) == 0
  np.testing.assert_array_equal(alone.ema["w"], params["w"])
  both = states.create_state(
    jax.random.key(0), params, optimizer, {"w": jnp.zeros(3)}, training().optimizer(None, lr=0.2)
  )
  assert jax.tree.structure(both.critic_opt_state) == jax.tree.structure(both.opt_state)
  np.testing.assert_array_equal(both.critic["w"], np.zeros(3))
