"""A critic of adapters: what it starts as, what an update moves, and that devices do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from hiar_jax.parallel.rules import tree_shardings
from hiar_jax.training.distill import Frozen
from hiar_jax.training.lora import Adapters, LoRAConfig
from hiar_jax.training.state import create_state
from tests.helpers.slow_cases import slow
from tests.helpers.training_steps import (
  MODEL,
  NEGATIVE,
  Case,
  compiled_quickly,  # noqa: F401
  linear_optimizer,  # noqa: F401
  make_batch,
  make_case,
  make_params,
)

ADAPTERS = Adapters(MODEL, LoRAConfig(rank=2, alpha=4.0))


def start():
  return ADAPTERS.start(jax.random.key(3), abstract_weights(MODEL))


def opened():
  """Adapters whose B is not zero any more."""
  rng = np.random.default_rng(5)
  return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), start())


def adapted(kind: str, trained) -> Case:
  """make_case's step, with adapters beside the weights of its critic."""
  plain = make_case(kind)
  config, networks, method, shape, optimizer = plain.make_step.args
  optimizers = config.generator_optimizer(MODEL), config.critic_optimizer(ADAPTERS)
  networks = networks._replace(adapters=ADAPTERS)
  optimizer = optimizers[0] if kind == "generator" else optimizers[1]
  make_step = functools.partial(plain.make_step.func, config, networks, method, shape, optimizer)
  create = lambda: create_state(
    jax.random.key(7), make_params(0), optimizers[0], trained, optimizers[1]
  )
  read = (make_params(2), NEGATIVE) if kind == "generator" else (None, None)
  return Case(create, make_step, Frozen(*read, make_params(1)))


def update(case: Case, mesh_config: MeshConfig, devices: int):
  """-> (state, metrics, frozen) after an update; state and frozen weights are split."""
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  split = lambda tree: tree_shardings(
    tree, mesh, ADAPTERS.sharding_rules, min_shard=mesh_config.min_shard
  )
  with jax.set_mesh(mesh):
    shardings = split(jax.eval_shape(case.create))
    state = jax.jit(case.create, out_shardings=shardings)()
    frozen = jax.device_put(case.frozen, split(case.frozen))
    step = map_step(case.make_step, shardings, mesh, mesh_config.mapping)
    state, metrics = step(state, put_batch(make_batch(0), mesh), frozen)
  return state, metrics, frozen


# --------------------------------------------------------------------------------------- the steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["critic", "generator"])
def test_at_the_start_it_is_the_whole_critic(kind):
  """B is zero: both steps measure what they do with the weights themselves."""
  values = []
  for case in (make_case(kind), adapted(kind, start())):
    state = jax.jit(case.create)()
    values.append(jax.jit(case.step)(state, make_batch(0), case.frozen)[1])
  whole, found = values
  for name in whole.keys() - {"grad_norm"}:
    np.testing.assert_allclose(found[name], whole[name], rtol=1e-6, err_msg=name)
  assert kind == "generator" or found["grad_norm"] < whole["grad_norm"]


@pytest.mark.slow
def test_adapters_alone_are_trained_and_the_loss_falls():
  """On the same draws. The base is an argument, and the student is let alone."""
  case = adapted("critic", start())
  first = state = jax.jit(case.create)()
  step, losses = jax.jit(case.step), []
  for _ in range(12):
    state, metrics = step(state.replace(step=first.step), make_batch(0), case.frozen)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.9 * losses[0]
  assert set(state.critic) == {"adapters"}
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first.critic, state.critic)
  assert min(jax.tree.leaves(moved)) > 0
  for one, other in zip(*map(jax.tree.leaves, (first.params, state.params)), strict=True):
    np.testing.assert_array_equal(one, other)


PLACES = {
  "2 x 2": (MeshConfig(data=2, fsdp=2, min_shard=16), 4),
  "pmap over 2": (MeshConfig(mapping="pmap"), 2),
}


@pytest.mark.parametrize(
  ("kind", "place"),
  slow(
    ("critic", "2 x 2"),
    ("critic", "pmap over 2"),
    ("generator", "2 x 2"),
    ("generator", "pmap over 2"),
  ),
)
def test_over_devices_the_update_is_the_same(kind, place):
  case = adapted(kind, opened())
  expected, loss, _ = update(case, MeshConfig(data=1), 1)
  found, other, frozen = update(case, *PLACES[place])
  for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = np.asarray(a), np.asarray(b)
      np.testing.assert_allclose(b, a, atol=3e-5 * max(1e-3, np.abs(a).max()))
  assert float(other["loss"]) == pytest.approx(float(loss["loss"]), rel=1e-5)
  if place == "2 x 2":
    kernel = lambda tree: tree["layers"]["mlp_in"]["kernel"]
    parts = [kernel(found.critic["adapters"])["a"], kernel(frozen.critic)]
    assert all(not x.sharding.is_fully_replicated for x in parts)


@pytest.mark.slow
def test_the_generator_looks_at_the_adapters():
  """Its gradient is another with other adapters; no base of the critic's means the real score's."""
  closed, open_ = adapted("generator", start()), adapted("generator", opened())
  step, batch = jax.jit(closed.step), make_batch(0)
  size = lambda case, frozen: float(step(jax.jit(case.create)(), batch, frozen)[1]["dmd_gradient"])
  assert abs(size(open_, open_.frozen) - size(closed, closed.frozen)) > 1e-4
  score, negative, _ = open_.frozen
  assert size(open_, Frozen(score, negative)) == size(open_, Frozen(score, negative, score))
