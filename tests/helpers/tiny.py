"""Networks that compile in a second: a DiT of a few thousand numbers, and a toy that obeys the same
interface (models.frames.Network).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.models import dit, frames
from hiar_jax.models.frames import Out
from hiar_jax.types import LatentShape
from tests.helpers import masked
from tests.helpers.compiling import quick_jit

CONFIG = dit.DiTConfig(
  dim=16, ffn_dim=24, num_heads=2, num_layers=2, patch=(1, 2, 2), channels=2, text_dim=6, freq_dim=8
)
BATCH, HEIGHT, WIDTH = 2, 4, 2
SIGMAS = np.asarray([1.0, 0.9, 0.6, 0.0], np.float32)


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def params(config: dit.DiTConfig = CONFIG):
  """Random everywhere: `DiTConfig.init` closes the head, which would hide everything behind it."""
  shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
  leaves, tree = jax.tree.flatten(shapes)
  return tree.unflatten(0.4 * random(i, *leaf.shape) for i, leaf in enumerate(leaves))


def video(seed: int, frames: int) -> np.ndarray:
  return random(seed, BATCH, frames, HEIGHT, WIDTH, CONFIG.channels)


def text() -> np.ndarray:
  return random(99, BATCH, 3, CONFIG.text_dim)


def noise_table(row: MethodConfig, blocks: int, seed: int = 7) -> np.ndarray:
  """[level, block, b, k, h, w, c] for the levels of SIGMAS and, behind them, for the contexts of
  each step; none is drawn on arrival at 0.
  """
  levels = 2 * SIGMAS.size - 1
  table = random(seed, levels, blocks, BATCH, row.block, HEIGHT, WIDTH, CONFIG.channels)
  table[SIGMAS.size - 1] = 0
  return table


def lookup(table):
  return lambda level, n: jnp.asarray(table)[level, n]


def shape(frames: int) -> LatentShape:
  return LatentShape(frames, HEIGHT, WIDTH, CONFIG.channels)


TOY_PARAMS = {
  "sigma": 0.7,
  "position": 0.5,
  "value": np.asarray([0.9, -1.1], np.float32),
  "mix": 1.3,
  "out": 0.8,
}


def toy_forward(params):
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


@dataclasses.dataclass(frozen=True)
class Toy:
  """The toy as a Network; its K/V are the DiT's, of one token a frame."""

  channels: int = CONFIG.channels
  sharding_rules = ()

  def empty_kv(self, frames: int, batch: int, height: int, width: int):
    zeros = jnp.zeros((2, batch, frames, 1, 1, self.channels))
    return dit.KV(zeros, zeros)

  def apply(self, params, groups, texts, past=(), start=None) -> Out:
    x = jnp.concatenate([g.x for g in groups], axis=1)
    sigma = [
      jnp.broadcast_to(jnp.asarray(s)[:, None] if jnp.ndim(s) == 1 else s, g.x.shape[:2])
      for g in groups
      for s in [g.sigma]
    ]
    positions = jnp.concatenate([g.positions for g in groups])
    mask = masked.frame_mask(groups, tuple(kv.v.shape[2] for kv in past))
    kept = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *past) if past else None
    v, kv = toy_forward(params)(x, jnp.concatenate(sigma, axis=1), positions, mask, kept)
    ends = np.cumsum([g.x.shape[1] for g in groups])
    cuts = [(int(end) - g.x.shape[1], int(end)) for g, end in zip(groups, ends, strict=True)]
    return Out(tuple(v[:, a:b] for a, b in cuts), tuple(kv.take(a, b) for a, b in cuts))


NETWORKS = {"toy": (Toy(), TOY_PARAMS), "dit": (CONFIG, params())}


def bind(name: str = "dit", params=None) -> frames.Bound:
  """One of NETWORKS with its parameters, or others, and the text of all tests."""
  network, own = NETWORKS[name]
  return frames.bind(network, own if params is None else params, text())


@functools.cache
def full_forward(network: str):
  """(params, x, sigma, positions, mask) -> velocity, compiled; around groups of frames."""

  def run(params, x, sigma, positions, mask):
    forward = toy_forward(params) if network == "toy" else masked.bind(CONFIG, params, text())
    return forward(x, sigma, positions, mask)[0]

  return quick_jit(run)
