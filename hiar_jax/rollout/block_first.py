"""Block-first order (Self-Forcing): each block is denoised to the end, then is clean context."""

import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.rollout.blocks import (
  Forward,
  Noise,
  Step,
  apply_with_cache,
  block_positions,
  join_blocks,
  prefill,
  renoise,
  write_context,
)
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.types import Video


def denoise_block(forward, noise, cache, n, sigmas, method: Method, exit_level):
  """Denoises block n from pure noise through the step at `exit_level` (may be traced).

  Returns (its input at that step, its x0 prediction), each [b k h w c].
  """
  positions = block_positions(n, method)

  def predict(x, level):
    step = Step(sigmas[level], sigmas[level + 1], positions)
    v, _ = apply_with_cache(forward, cache, x, step.sigma, positions, method)
    return renoise(method, x, v, step, lambda: noise(level + 1, n))

  # the exit step itself stands outside the loop, for its x0 and not only its next latent
  x = jax.lax.fori_loop(0, exit_level, lambda level, x: predict(x, level)[0], noise(0, n))
  return x, predict(x, exit_level)[1]


def sweep(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas,
  method: Method,
  blocks: int,
  exit_level,
  *,
  first=0,
):
  """Denoises `blocks` blocks from block `first` on, each through the step at `exit_level`.

  Returns (their inputs at that step, their x0 predictions), each [n b k h w c].
  """

  def next_block(cache, n):
    x, x0 = denoise_block(forward, noise, cache, n, sigmas, method, exit_level)
    return write_context(forward, cache, x0, 0.0, block_positions(n, method), method), (x, x0)

  return jax.lax.scan(next_block, cache, first + jnp.arange(blocks))[1]


def rollout(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  *,
  given: Video | None = None,
) -> Video:
  """Generates a video; arguments and result are those of step_first.rollout."""
  first = 0 if given is None else given.shape[1] // method.block
  if given is not None:
    cache = prefill(forward, cache, given, method)
  # the x0 of the last step, which goes from sigmas[-2] to 0, is the clean latent
  _, xs = sweep(forward, noise, cache, sigmas, method, blocks, len(sigmas) - 2, first=first)
  video = join_blocks(xs)
  return video if given is None else jnp.concatenate([given, video], axis=1)
