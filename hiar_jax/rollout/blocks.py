"""The primitives of every rollout: denoise a block against a cache, show a block to its successors,
and both in one forward.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.method import Method
from hiar_jax.models.dit import KV
from hiar_jax.rollout.past.ring import Cache, write
from hiar_jax.rollout.past.visibility import own_block_mask, past_mask
from hiar_jax.types import Block, Positions, Video

Forward = Callable[..., tuple[jax.Array, KV]]  # models.dit.bind
# (level, block) -> eps; level 0 is where a block starts
Noise = Callable[[jax.Array | int, jax.Array | int], Block]


@dataclasses.dataclass(frozen=True)
class Step:
  """One denoising step of one block: from `sigma` to `sigma_next`, its frames at `positions`."""

  sigma: jax.Array
  sigma_next: jax.Array
  positions: Positions


def block_positions(block, method: Method) -> Positions:
  """Frame indices of a block; `block` may be traced."""
  return block * method.block + jnp.arange(method.block, dtype=jnp.int32)


def split_blocks(video: Video, method: Method) -> jax.Array:
  """[b f h w c] -> [n b k h w c]."""
  b, f, *rest = video.shape
  return jnp.moveaxis(video.reshape(b, f // method.block, method.block, *rest), 1, 0)


def join_blocks(blocks: jax.Array) -> Video:
  """[n b k h w c] -> [b f h w c]."""
  n, b, k, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * k, *rest)


def renoise(
  method: Method, x: Block, v: Block, step: Step, eps: Callable[[], Block]
) -> tuple[Block, Block]:
  """(x at sigma_next, x0 prediction).

  `fresh`: x0 and new noise; `euler`: along the velocity (paper, Eq. 3).
  """
  x0 = flow.x0_from_velocity(x, v, step.sigma)
  if method.renoise == "euler":
    return flow.euler(x, v, step.sigma, step.sigma_next), x0
  return flow.add_noise(x0, eps(), step.sigma_next), x0


def context_latent(method: Method, x: Block, x_next: Block, x0: Block) -> Block:
  """The latent that a block's successors see, at method.context_sigma."""
  return {"output": x_next, "clean": x0, "input": x}[method.level]


def _visible(cache: Cache, method: Method, positions: Positions) -> jax.Array:
  return jnp.concatenate(
    [past_mask(positions, cache.position, method), own_block_mask(positions, positions, method)],
    axis=1,
  )


def apply_with_cache(
  forward: Forward, cache: Cache, x: Block, sigma, positions: Positions, method: Method
):
  """One block's forward: (velocity, its own K/V)."""
  return forward(x, sigma, positions, mask=_visible(cache, method, positions), past=cache.kv)


def write_context(
  forward: Forward, cache: Cache, context: Block, sigma, positions: Positions, method: Method
) -> Cache:
  """Writes a block's context at `sigma` into the cache."""
  _, kv = apply_with_cache(forward, cache, context, sigma, positions, method)
  return write(cache, kv, positions, method)


def write_context_and_denoise(
  forward: Forward,
  cache: Cache,
  context: Block,
  context_sigma,
  x: Block,
  step: Step,
  method: Method,
) -> tuple[Block, Cache]:
  """[context of block n | noisy block n + 1] in one forward (HiAR, section 3.3): (velocity of n +
  1, cache with n).
  """
  k = method.block
  positions = jnp.concatenate([step.positions - k, step.positions])
  own = jnp.concatenate(
    [past_mask(positions, step.positions - k, method), jnp.zeros((2 * k, k), bool)], axis=1
  )
  own = own | own_block_mask(positions, positions, method)
  mask = jnp.concatenate([past_mask(positions, cache.position, method), own], axis=1)
  levels = jnp.concatenate(
    [jnp.full((x.shape[0], k), context_sigma), jnp.full((x.shape[0], k), step.sigma)], axis=1
  )
  v, kv = forward(
    jnp.concatenate([context, x], axis=1), levels, positions, mask=mask, past=cache.kv
  )
  kv = jax.tree.map(lambda leaf: leaf[:, :, :k], kv)
  return v[:, k:], write(cache, kv, positions[:k], method)


def prefill(forward: Forward, cache: Cache, given: Video, method: Method) -> Cache:
  """Shows given frames (clean, sigma 0) block by block: the start of a continuation, or a clean
  sink.
  """

  def one(cache, inputs):
    block, x = inputs
    return write_context(forward, cache, x, 0.0, block_positions(block, method), method), None

  blocks = split_blocks(given, method)
  return jax.lax.scan(one, cache, (jnp.arange(blocks.shape[0]), blocks))[0]
