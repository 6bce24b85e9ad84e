"""Step-first order (HiAR, Algorithm 1): every block takes one denoising step before any block takes
the next.

    for j = 1..S:  for n = 1..N:  x_{j+1}^(n) = step(x_j^(n), t_j | history of blocks < n)

A scan over noise levels; in it a scan over blocks that carries the KV cache, started afresh at
every level.
"""

import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.rollout.blocks import (
  Forward,
  Noise,
  Step,
  apply_with_cache,
  block_positions,
  context_latent,
  join_blocks,
  prefill,
  renoise,
  write_context,
  write_context_and_denoise,
)
from hiar_jax.rollout.past.ring import Cache, write
from hiar_jax.types import Video


def sweep(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  xs: jax.Array,
  sigmas: jax.Array,
  level,
  method: Method,
  *,
  first: int = 0,
  fused: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One noise level for all blocks: xs [n b k h w c] at sigmas[level] -> (xs at the next level,
  what successors were shown, x0).

  first: index of the first block (blocks before it are in `cache`). fused: N forwards of two blocks
  instead of 2 N of one.
  """
  sigma, sigma_next = sigmas[level], sigmas[level + 1]
  context_sigma = method.context_sigma(sigma, sigma_next)

  def finish(x, v, n, step):
    x_next, x0 = renoise(method, x, v, step, lambda: noise(level + 1, n))
    return x_next, context_latent(method, x, x_next, x0), x0

  def separate(cache, inputs):
    n, x = inputs
    step = Step(sigma, sigma_next, block_positions(n, method))
    v, kv = apply_with_cache(forward, cache, x, sigma, step.positions, method)
    done = finish(x, v, n, step)
    if method.level == "input":  # what successors read is what this forward has just computed
      return write(cache, kv, step.positions, method), done
    return write_context(forward, cache, done[1], context_sigma, step.positions, method), done

  def together(carry, inputs):
    cache, context = carry
    n, x = inputs
    step = Step(sigma, sigma_next, block_positions(n, method))
    v, cache = write_context_and_denoise(forward, cache, context, context_sigma, x, step, method)
    done = finish(x, v, n, step)
    return (cache, done[1]), done

  indices = first + jnp.arange(xs.shape[0])
  if method.level == "input" or not fused:
    return jax.lax.scan(separate, cache, (indices, xs))[1]

  step = Step(sigma, sigma_next, block_positions(indices[0], method))
  v, _ = apply_with_cache(forward, cache, xs[0], sigma, step.positions, method)
  head = finish(xs[0], v, indices[0], step)
  _, tail = jax.lax.scan(together, (cache, head[1]), (indices[1:], xs[1:]))
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), head, tail)


def start(noise: Noise, blocks: int, first: int = 0) -> jax.Array:
  """Pure noise for `blocks` blocks: [n b k h w c]."""
  return jax.lax.map(lambda n: noise(0, n), first + jnp.arange(blocks))


def levels(
  forward, noise, cache, xs, sigmas, method: Method, upto, *, first: int = 0, fused: bool = True
) -> jax.Array:
  """`upto` levels (may be traced; not differentiable): xs at sigmas[0] -> xs at sigmas[upto]."""

  def one(level, xs):
    return sweep(forward, noise, cache, xs, sigmas, level, method, first=first, fused=fused)[0]

  return jax.lax.fori_loop(0, upto, one, xs)


def rollout(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  *,
  given: Video | None = None,
  fused: bool = True,
) -> Video:
  """`blocks` new blocks [b f h w c] after the `given` clean ones (which are put first in the
  result).

  cache: an empty one. noise(level, block): block counts from the video's start, given blocks
  included.
  """
  first = 0 if given is None else given.shape[1] // method.block
  if given is not None:
    cache = prefill(forward, cache, given, method)

  def one(xs, level):
    return sweep(forward, noise, cache, xs, sigmas, level, method, first=first, fused=fused)[
      0
    ], None

  xs, _ = jax.lax.scan(one, start(noise, blocks, first), jnp.arange(len(sigmas) - 1))
  video = join_blocks(xs)
  return video if given is None else jnp.concatenate([given, video], axis=1)
