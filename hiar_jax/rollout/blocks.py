"""The primitives of every rollout: denoise a block, write its context into the cache, or both.

Context is what the blocks after a block see of it: the K/V of its latent at a noise level that the
method sets. Those K/V take a forward pass over that latent, since its noise level is not the one at
which the block was denoised (except at method.level = "input").
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

# models.dit.bind: (x, sigma, positions, mask, past) -> (velocity, K/V of x's frames)
Forward = Callable[..., tuple[jax.Array, KV]]
# (level, block) -> eps [b k h w c] with which the block arrives at the level; at level 0 it starts
Noise = Callable[[jax.Array | int, jax.Array | int], Block]


@dataclasses.dataclass(frozen=True)
class Step:
  """One denoising step of one block: from `sigma` to `sigma_next`, its frames at `positions`."""

  sigma: jax.Array
  sigma_next: jax.Array
  positions: Positions


def block_positions(block, method: Method) -> Positions:
  """Returns the frame indices [k] of a block; `block` may be traced."""
  return block * method.block + jnp.arange(method.block, dtype=jnp.int32)


def split_blocks(video: Video, method: Method) -> jax.Array:
  """[b f h w c] -> [n b k h w c], with blocks in front for lax.scan."""
  b, f, *rest = video.shape
  return jnp.moveaxis(video.reshape(b, f // method.block, method.block, *rest), 1, 0)


def join_blocks(blocks: jax.Array) -> Video:
  """[n b k h w c] -> [b f h w c]."""
  n, b, k, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * k, *rest)


def renoise(
  method: Method, x: Block, v: Block, step: Step, eps: Callable[[], Block]
) -> tuple[Block, Block]:
  """Returns (x at sigma_next, x0 prediction) from the velocity v at x.

  `fresh` adds the new noise eps() to x0; `euler` follows the velocity (HiAR, Eq. 3) and draws none.
  """
  x0 = flow.x0_from_velocity(x, v, step.sigma)
  if method.renoise == "euler":
    return flow.euler(x, v, step.sigma, step.sigma_next), x0
  return flow.add_noise(x0, eps(), step.sigma_next), x0


def context_latent(method: Method, x: Block, x_next: Block, x0: Block) -> Block:
  """Returns the latent that later blocks see of a block, at method.context_sigma."""
  return {"output": x_next, "clean": x0, "input": x}[method.level]


def apply_with_cache(
  forward: Forward, cache: Cache, x: Block, sigma, positions: Positions, method: Method
):
  """Runs one block against the cache: (velocity, the block's own K/V)."""
  # [k, slots + k]: forward puts `past` before the block's own keys
  mask = jnp.concatenate(
    [past_mask(positions, cache.position, method), own_block_mask(positions, positions, method)],
    axis=1,
  )
  return forward(x, sigma, positions, mask=mask, past=cache.kv)


def write_context(
  forward: Forward, cache: Cache, context: Block, sigma, positions: Positions, method: Method
) -> Cache:
  """Writes the K/V of a block's context latent at `sigma` into the cache."""
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
  """Runs [context of block n | noisy block n + 1] in one forward (HiAR, section 3.3).

  x, step: of block n + 1. Returns (velocity of block n + 1, cache with block n written).
  """
  k = method.block
  positions = jnp.concatenate([step.positions - k, step.positions])
  # Mask [2 k, slots + 2 k] over [cache | context | noisy]:
  #   context of n    sees the cache and itself
  #   noisy n + 1     sees the cache, the context and itself
  # The context's columns are past for the noisy rows only (past_mask: earlier blocks); nobody but
  # the noisy block itself sees its own columns.
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
  kv = jax.tree.map(lambda leaf: leaf[:, :, :k], kv)  # [num_layers b 2k t a d] -> the context's
  return v[:, k:], write(cache, kv, positions[:k], method)


def prefill(forward: Forward, cache: Cache, given: Video, method: Method) -> Cache:
  """Writes `given` clean frames into the cache block by block, at sigma 0.

  They are the start of a continuation, or a clean sink.
  """

  def write_block(cache, inputs):
    block, x = inputs
    return write_context(forward, cache, x, 0.0, block_positions(block, method), method), None

  blocks = split_blocks(given, method)
  return jax.lax.scan(write_block, cache, (jnp.arange(blocks.shape[0]), blocks))[0]
