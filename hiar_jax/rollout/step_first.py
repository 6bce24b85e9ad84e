"""Step-first order (HiAR, Algorithm 1): all blocks take a denoising step before any takes the next.

    for j = 1..S:  for n = 1..N:  x_{j+1}^(n) = step(x_j^(n), t_j | context of blocks < n)

A scan over noise levels; in it a scan over blocks that carries the KV cache. Every level starts
from the same cache, empty but for given frames: context belongs to one level.
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
  """Takes all blocks xs [n b k h w c] from sigmas[level] to the next level.

  first: index of the first block (blocks before it are in `cache`). fused: N forwards, all but
  one over two blocks, instead of 2 N over one. Returns (xs at the next level, context latents, x0
  predictions), each [n b k h w c].
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
    outputs = finish(x, v, n, step)
    if method.level == "input":  # the context is the block as it is here: its K/V are done
      return write(cache, kv, step.positions, method), outputs
    cache = write_context(forward, cache, outputs[1], context_sigma, step.positions, method)
    return cache, outputs

  def together(carry, inputs):
    cache, context = carry  # context: latent of block n - 1, not in the cache yet
    n, x = inputs
    step = Step(sigma, sigma_next, block_positions(n, method))
    v, cache = write_context_and_denoise(forward, cache, context, context_sigma, x, step, method)
    outputs = finish(x, v, n, step)
    return (cache, outputs[1]), outputs

  indices = first + jnp.arange(xs.shape[0])
  if method.level == "input" or not fused:
    return jax.lax.scan(separate, cache, (indices, xs))[1]

  # the first block has no context to write, and nobody reads the context of the last
  step = Step(sigma, sigma_next, block_positions(indices[0], method))
  v, _ = apply_with_cache(forward, cache, xs[0], sigma, step.positions, method)
  head = finish(xs[0], v, indices[0], step)
  _, tail = jax.lax.scan(together, (cache, head[1]), (indices[1:], xs[1:]))
  return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), head, tail)


def start(noise: Noise, blocks: int, first: int = 0) -> jax.Array:
  """Returns the pure noise of `blocks` blocks from block `first` on: [n b k h w c]."""
  # lax.map, not vmap: the draws of one block at a time are in memory
  return jax.lax.map(lambda n: noise(0, n), first + jnp.arange(blocks))


def levels(
  forward, noise, cache, xs, sigmas, method: Method, stop, *, first: int = 0, fused: bool = True
) -> jax.Array:
  """Takes xs [n b k h w c] from sigmas[0] to sigmas[stop]; stop may be traced.

  Not differentiable: a loop of unknown length has no backward pass.
  """

  def next_level(level, xs):
    return sweep(forward, noise, cache, xs, sigmas, level, method, first=first, fused=fused)[0]

  return jax.lax.fori_loop(0, stop, next_level, xs)


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
  """Generates `blocks` blocks after the `given` clean frames: [b given + blocks k h w c].

  cache: an empty one. noise(level, block): block counts from the start of the video, given blocks
  included. sigmas: [s + 1].
  """
  first = 0 if given is None else given.shape[1] // method.block
  if given is not None:
    cache = prefill(forward, cache, given, method)

  def next_level(xs, level):
    xs, _, _ = sweep(forward, noise, cache, xs, sigmas, level, method, first=first, fused=fused)
    return xs, None

  xs, _ = jax.lax.scan(next_level, start(noise, blocks, first), jnp.arange(len(sigmas) - 1))
  video = join_blocks(xs)
  return video if given is None else jnp.concatenate([given, video], axis=1)
