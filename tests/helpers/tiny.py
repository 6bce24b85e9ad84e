"""Networks that compile in a second: a DiT of a few thousand numbers, and a toy that obeys the same
interface.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.rollout.past import ring as caches
from tests.helpers.compiling import quick_jit

CONFIG = dit.DiTConfig(
  dim=16, ffn_dim=24, num_heads=2, num_layers=2, patch=(1, 2, 2), channels=2, text_dim=6, freq_dim=8
)
BATCH, HEIGHT, WIDTH = 2, 4, 2
TOY_CONFIG = dit.DiTConfig(
  dim=2, ffn_dim=2, num_heads=1, num_layers=2, patch=(1, HEIGHT, WIDTH), channels=2
)
SIGMAS = np.asarray([1.0, 0.9, 0.6, 0.0], np.float32)


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def params(config: dit.DiTConfig = CONFIG):
  """Random everywhere: `dit.init` closes the head, which would hide everything behind it."""
  shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
  leaves, tree = jax.tree.flatten(shapes)
  return tree.unflatten(0.4 * random(i, *leaf.shape) for i, leaf in enumerate(leaves))


def video(seed: int, frames: int) -> np.ndarray:
  return random(seed, BATCH, frames, HEIGHT, WIDTH, CONFIG.channels)


def text() -> np.ndarray:
  return random(99, BATCH, 3, CONFIG.text_dim)


def noise_table(row: Method, blocks: int, seed: int = 7) -> np.ndarray:
  """[level, block, b, k, h, w, c] for the levels of SIGMAS; none is drawn on arrival at 0."""
  table = random(seed, SIGMAS.size, blocks, BATCH, row.block, HEIGHT, WIDTH, CONFIG.channels)
  table[-1] = 0
  return table


def lookup(table):
  return lambda level, n: jnp.asarray(table)[level, n]


def bind(params):
  return dit.bind(CONFIG, params, text())


def cache(row: Method, frames: int, config: dit.DiTConfig = CONFIG) -> caches.Cache:
  return caches.empty(config, row, batch=BATCH, frames=frames, height=HEIGHT, width=WIDTH)


TOY_PARAMS = {
  "sigma": 0.7,
  "position": 0.5,
  "value": np.asarray([0.9, -1.1], np.float32),
  "mix": 1.3,
  "out": 0.8,
}


def toy(params):
  """Two rounds of averaging over visible frames: depends on latents, levels, positions, and what
  the past had seen.
  """

  def forward(x, sigma, positions, mask=None, past=None):
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma = sigma[:, None] if sigma.ndim == 1 else sigma
    sigma = jnp.broadcast_to(sigma.reshape((1,) * (2 - sigma.ndim) + sigma.shape), x.shape[:2])
    place = params["position"] * jnp.sin(positions.astype(jnp.float32))
    h = jnp.tanh(
      x[:, :, 0, 0]
      + 0.5 * x[:, :, 1, 1]
      + params["sigma"] * sigma[..., None]
      + place[None, :, None]
    )
    values = []
    for layer in range(2):
      own = jnp.tanh(params["value"][layer] * h)
      values.append(own)
      seen = (
        own
        if past is None
        else jnp.concatenate([past.v[layer].reshape(len(x), -1, own.shape[-1]), own], axis=1)
      )
      weight = jnp.ones((x.shape[1], seen.shape[1])) if mask is None else mask.astype(jnp.float32)
      mean = jnp.einsum("fp,bpc->bfc", weight / weight.sum(1, keepdims=True), seen)
      h = jnp.tanh(h + params["mix"] * mean)
    own = jnp.stack(values)[:, :, :, None, None]
    return 0.5 * x + params["out"] * h[:, :, None, None], dit.KV(own, own)

  return forward


NETWORKS = {"toy": (toy, TOY_PARAMS, TOY_CONFIG), "dit": (bind, params(), CONFIG)}


@functools.cache
def full_forward(network: str):
  """(params, x, sigma, positions, mask) -> velocity, compiled."""
  make = NETWORKS[network][0]
  return quick_jit(
    lambda params, x, sigma, positions, mask: make(params)(x, sigma, positions, mask)[0]
  )
