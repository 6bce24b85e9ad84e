"""A stream again, in the plainest way: a loop over levels and one over blocks, every block's text
its own, one forward at a time.

Keys and values are kept by frame in dictionaries and never leave them; what a block may see is
decided frame by frame. Written from the definitions in rollout.tick, not from its code.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.models import dit, rope
from tests.helpers import masked
from tests.helpers.compiling import quick_jit


@functools.cache
def _forward(config: dit.DiTConfig):
  def run(params, text, x, sigma, positions, mask, past):
    return masked.bind(config, params, text)(x, sigma, positions, mask=mask, past=past)

  return quick_jit(run)


def turned(keys: np.ndarray, frames: int) -> np.ndarray:
  """Rotated keys [... d], `frames` further on, in float64."""
  pairs = rope.split_pairs(keys.shape[-1])[0]
  numbers = keys.astype(np.float64).reshape(*keys.shape[:-1], -1, 2)
  numbers = numbers[..., 0] + 1j * numbers[..., 1]
  numbers[..., :pairs] *= np.exp(1j * frames * rope.frequencies(pairs))
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(keys.shape).astype(np.float32)


@dataclasses.dataclass
class PlainStream:
  """texts(n): [b l d] of block n; noise(level, n): [b k h w c]; recache: blocks before which the
  history is encoded again.
  """

  config: dit.DiTConfig
  params: dict
  row: MethodConfig
  sigmas: tuple[float, ...]
  blocks: int
  texts: object
  noise: object
  recache: frozenset = frozenset()
  carried: bool = False

  def visible(self, n: int, frame: int) -> bool:
    row = self.row
    end = n * row.block + row.block - 1
    return not row.window or frame < row.sink or frame > end - (row.window - row.sink)

  def forward(self, past: dict, n: int, x, sigma, text, own=None):
    """Block n against {frame: (k, v)}: velocity, {frame: (k, v)}.

    own: its frames that are there.
    """
    row, k, total = self.row, self.row.block, self.blocks * self.row.block
    frames = range(n * k, n * k + k)
    own = set(frames) if own is None else own
    tokens = self.config.tokens(*x.shape[2:4])
    store = np.zeros(
      (
        2,
        self.config.num_layers,
        x.shape[0],
        total,
        tokens,
        self.config.num_heads,
        self.config.head_dim,
      ),
      np.float32,
    )
    mask = np.zeros((k, total + k), bool)
    for frame, (key, value) in past.items():
      if self.visible(n, frame) and frame < n * k:
        moved = max(0, n * k + k - row.window) if self.carried and frame < row.sink else 0
        store[0, :, :, frame], store[1, :, :, frame] = turned(key, moved) if moved else key, value
        mask[:, frame] = True
    for i, frame in enumerate(frames):
      mask[:, total + i] = frame in own
      mask[i, total + i] = True
    levels = np.broadcast_to(np.asarray(sigma, np.float32), x.shape[:2])
    past = dit.KV(jnp.asarray(store[0]), jnp.asarray(store[1]))
    v, kv = _forward(self.config)(
      self.params, text, np.asarray(x), levels, np.asarray(frames, np.int32), mask, past
    )
    kv = jax.tree.map(np.asarray, kv)
    return np.asarray(v), {
      frame: (kv.k[:, :, i], kv.v[:, :, i]) for i, frame in enumerate(frames) if frame in own
    }

  def encode_again(self, latents: dict, sigma_of, n: int) -> dict:
    """The history before block n under n's text: what the cache still holds, the sink and the
    ring's frames; the pending block is whole.
    """
    row, k = self.row, self.row.block
    pending = 0 if row.level == "input" else 1
    end, ring = (n - pending) * k, row.window - k - row.sink
    kept = {
      f
      for m in latents
      for f in range(m * k, m * k + k)
      if f < row.sink or end - ring <= f or m >= n - pending
    }
    past = {}
    for m in sorted(latents):
      own = {f for f in range(m * k, m * k + k) if f in kept}
      if own:
        past.update(self.forward(past, m, latents[m], sigma_of(m), self.texts(n), own)[1])
    return past

  def run(self, given: list | None = None) -> list[np.ndarray]:
    """The clean latents of all blocks, given ones first."""
    row, given = self.row, given or []
    first = len(given)
    xs = {n: np.asarray(self.noise(0, n)) for n in range(first, self.blocks)}
    for level, (sigma, lower) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
      past, latents = {}, {}
      for m, x in enumerate(given):
        past.update(self.forward(past, m, x, 0.0, self.texts(m))[1])
        latents[m] = x
      fixed = float(row.level.partition(":")[2] or 0)  # the level of `fixed:0.3`
      context_sigma = {"output": lower, "clean": 0.0, "input": sigma}.get(row.level, fixed)
      for n in range(first, self.blocks):
        if n in self.recache and n > 0:
          past = self.encode_again(latents, lambda m: 0.0 if m < first else context_sigma, n)  # noqa: B023
        x = xs[n]
        v, own = self.forward(past, n, x, sigma, self.texts(n))
        x0 = x - np.float32(sigma) * v
        if row.renoise == "euler":
          xs[n] = x + np.float32(lower - sigma) * v
        else:
          xs[n] = np.float32(1 - lower) * x0 + np.float32(lower) * np.asarray(
            self.noise(level + 1, n)
          )
        if fixed:
          eps = np.asarray(self.noise(len(self.sigmas) + level, n))
          latents[n] = np.float32(1 - fixed) * x0 + np.float32(fixed) * eps
        else:
          latents[n] = {"output": xs[n], "clean": x0, "input": x}[row.level]
        if row.level != "input":
          _, own = self.forward(past, n, latents[n], context_sigma, self.texts(n))
        past.update(own)
    return [*given, *(xs[n] for n in range(first, self.blocks))]
