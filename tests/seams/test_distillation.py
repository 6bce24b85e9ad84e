"""The tenth hard case: a generator and five critic updates, a frozen score, accumulation 2."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.training import distill
from hiar_jax.training import state as states
from hiar_jax.types import LatentShape
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.seams.cases import recorded
from tests.seams.plain_wan import PlainWan

NETWORK = PlainWan(dim=16, heads=2, layers=2, freq_dim=8)
SHAPE = LatentShape(6, tiny.HEIGHT, tiny.WIDTH, tiny.CONFIG.channels)
METHOD = MethodConfig(window=5, sink=1).at(tiny.SIGMAS)
CONFIG = distill.DistillConfig(
  steps=5,
  batch=4,
  lr=0.02,
  critic_lr=0.03,
  accumulate=2,
  clip=0.5,
  guidance=2.0,
  ema_decay=0.9,
)
TOLERANCE = 5e-4  # of the way that a leaf has moved


def params(seed: int):
  return jax.tree.map(lambda x: x + 0.02 * tiny.random(seed, *x.shape), tiny.params())


def batch(step: int):
  trajectory = tiny.random(50 + step, 4, tiny.SIGMAS.size, *SHAPE.clip)
  text, other = (tiny.random(60 + step + n, 4, 3, tiny.CONFIG.text_dim) for n in (0, 30))
  return {
    "text": text,
    "example_id": np.arange(4, dtype=np.int32),
    "trajectories": {"trajectory": trajectory, "text": other},
  }


@pytest.fixture(scope="module", autouse=True)
def linear_optimizer():
  """AdamW divides by the gradient's size, so that rounding would be seen at full scale."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optax, "adamw", lambda rate, **_: optax.sgd(rate, momentum=0.9))
    yield


def created():
  return states.create_state(
    jax.random.key(7),
    params(1),
    CONFIG.generator_optimizer(NETWORK),
    params(2),
    CONFIG.critic_optimizer(NETWORK),
  )


def negative():
  return tiny.random(98, 1, 3, tiny.CONFIG.text_dim)


def advance(generator, critic):
  """The generator first, then five critic updates, a fresh batch each: (state, metrics)."""
  state, metrics = generator(created(), batch(0))
  losses = [metrics]
  for step in range(5):
    state, metrics = critic(state, batch(1 + step))
    losses.append(metrics)
  return state, losses


def distilled():
  """(the state, the metrics of each update)."""
  networks = distill.Networks(NETWORK, NETWORK, NETWORK)
  frozen = distill.Frozen(params(3), jnp.asarray(negative()))
  common = CONFIG, networks, METHOD, SHAPE
  generator = distill.make_generator_step(*common, CONFIG.generator_optimizer(NETWORK))
  critic = distill.make_critic_step(*common, CONFIG.critic_optimizer(NETWORK))
  return advance(
    quick_jit(lambda s, b: generator(s, b, frozen)), quick_jit(lambda s, b: critic(s, b, frozen))
  )


@pytest.mark.slow
def test_10_one_generator_and_five_critic_updates():
  """Against what was recorded of steps that embedded tokens themselves."""
  state, losses = distilled()
  assert losses[0].pop("dmd_not_finite") == 0  # it was not logged then
  for i, metrics in enumerate(losses):
    for name, value in metrics.items():
      old = recorded()[f"distilled metrics {i} {name}"]
      np.testing.assert_allclose(value, old, rtol=1e-5, err_msg=name)
  for which, before in (("params", params(1)), ("critic", params(2))):
    leaves = jax.tree_util.tree_leaves_with_path(getattr(state, which))
    for (path, leaf), start in zip(leaves, jax.tree.leaves(before), strict=True):
      path = jax.tree_util.keystr(path)
      old = recorded()[f"distilled {which} {path}"]
      moved, error = np.abs(old - start).max(), np.abs(leaf - old).max()
      assert moved > 0 and error <= TOLERANCE * moved, (path, moved, error)


def test_10_keys_are_folded():
  """fold_in(key, i) is split(key, n)[i], bit for bit: terms may be added without new draws."""
  key = jax.random.key(3)
  for i, part in enumerate(jax.random.split(key, 3)):
    assert jax.random.key_data(jax.random.fold_in(key, i)).tolist() == (
      jax.random.key_data(part).tolist()
    )
