"""Training's exit step of a network and a context level of one's own, against the plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import bind
from hiar_jax.rollout import exit_step
from hiar_jax.rollout.noise import block_noise
from hiar_jax.types import LatentShape
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.plugs.network import Groupwise
from tests.plugs.oracle import Oracle

NETWORK = Groupwise(width=16, depth=2, heads=2, channels=2, text_dim=5)
SHAPE, BLOCKS = LatentShape(6, 2, 4, 2), 3
ROWS = {
  "step_first": dict(window=5, sink=1),
  "attached": dict(window=5, sink=1, gradient="attached"),
  "block_first": dict(window=0, order="block_first"),
}
LEVELS = range(tiny.SIGMAS.size - 1)


@functools.cache
def case(name: str) -> Oracle:
  method = MethodConfig(block=2, level="half", **ROWS[name]).at(tiny.SIGMAS)
  noise = jax.jit(block_noise(jax.random.key(8), np.arange(2), SHAPE.block(2)))
  params, text = NETWORK.init(jax.random.key(1)), tiny.random(4, 2, 3, 5)
  return Oracle(NETWORK, params, text, method, noise, start=jnp.asarray([0, 5]))


@functools.cache
def walked(name: str, level: int):
  return case(name).walk(BLOCKS, level)


def weights() -> np.ndarray:
  return tiny.random(6, 2, *SHAPE.clip)


@functools.cache
def ours(name: str):
  """level -> (gradient of the weighted sum of x0, x0), and level -> x0 without gradient."""
  o = case(name)
  noise = block_noise(jax.random.key(8), np.arange(2), SHAPE.block(2))

  def loss(params, level):
    bound = bind(NETWORK, params, o.text[0], o.start)
    x0 = exit_step.self_rollout(bound, noise, o.method, SHAPE, level)
    return jnp.sum(x0 * weights()), x0

  def values(level):
    bound = bind(NETWORK, o.params, o.text[0], o.start)
    return exit_step.self_rollout_without_gradient(bound, noise, o.method, SHAPE, level)

  return quick_jit(lambda level: jax.grad(loss, has_aux=True)(o.params, level)), quick_jit(values)


@functools.cache
def oracles_gradient(name: str):
  """(blocks before the exit step, their contexts, sigma) -> gradient of the weighted sum of x0."""
  o = case(name)
  velocity = o.velocity if o.method.gradient == "attached" else o.velocity_detached

  def loss(params, before, contexts, sigma):
    x0s = [x - sigma * velocity(params, [*contexts[:n], (x, sigma)]) for n, x in enumerate(before)]
    return jnp.sum(jnp.concatenate(x0s, axis=1) * weights())

  return quick_jit(jax.grad(loss))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ROWS)
def test_x0_and_gradient(name, level):
  before, contexts, x0s = walked(name, level)
  expected = np.concatenate(x0s, axis=1)
  close = dict(rtol=0, atol=2e-5 * np.abs(expected).max())
  differentiated, values = ours(name)
  gradient, x0 = differentiated(level)
  np.testing.assert_allclose(x0, expected, **close)
  np.testing.assert_allclose(values(level), expected, **close)
  wanted = oracles_gradient(name)(case(name).params, before, contexts, tiny.SIGMAS[level])
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
  ):
    assert np.abs(w).max() > 1e-3, path
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-4 * np.abs(w).max(), err_msg=str(path))


@pytest.mark.slow
def test_the_contexts_gradient_is_not_small():
  """Or the two kinds of gradient could not be told apart."""
  detached, attached = (ours(name)[0](1)[0]["depth0"]["wkv"] for name in ("step_first", "attached"))
  assert np.abs(detached - attached).max() > 0.05 * np.abs(attached).max()
