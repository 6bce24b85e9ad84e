"""Step-first order (HiAR, Algorithm 1): all blocks take a denoising step before any takes the next.

    for j = 1..S:  for n = 1..N:  x_{j+1}^(n) = step(x_j^(n), t_j | context of blocks < n)

A scan over noise levels; in it a scan over blocks that carries the past. Every level starts from
the
same past, empty but for given frames: context belongs to one level.
"""

import jax
import jax.numpy as jnp

from hiar_jax.models.frames import Bound, Frames
from hiar_jax.rollout.blocks import (
  Noise,
  Step,
  denoise,
  write_context,
  write_context_and_denoise,
)
from hiar_jax.rollout.past.ring import Ring


def sweep(
  bound: Bound,
  noise: Noise,
  past: Ring,
  xs: jax.Array,
  level,
  *,
  first: int = 0,
  fused: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Takes all blocks xs [n b k h w c] from `level` to the next.

  first: index of the first block (blocks before it are in `past`). fused: N forwards, all but one
  over two blocks, instead of 2 N over one. Returns (xs at the next level, context latents, x0
  predictions), each [n b k h w c].
  """
  method = past.method

  def separate(past, inputs):
    n, x = inputs
    step = Step(method, level, n)
    v, kv = denoise(bound, past, Frames(x, step.sigma, step.positions))
    outputs = step.finish(x, v, noise)
    if method.context.free:  # the context is the block as it is here: its K/V are done
      return past.write(kv, Frames(x, step.sigma, step.positions)), outputs
    context = Frames(outputs[1], step.context_sigma, step.positions)
    return write_context(bound, past, context), outputs

  def together(carry, inputs):
    past, context = carry  # context: latent of block n - 1, not in the past yet
    n, x = inputs
    step = Step(method, level, n)
    before = Frames(context, step.context_sigma, step.positions - method.block)
    v, past = write_context_and_denoise(bound, past, before, Frames(x, step.sigma, step.positions))
    outputs = step.finish(x, v, noise)
    return (past, outputs[1]), outputs

  indices = first + jnp.arange(xs.shape[0])
  if method.context.free or not fused:
    return jax.lax.scan(separate, past, (indices, xs))[1]

  # the first block has no context to write, and nobody reads the context of the last
  step = Step(method, level, indices[0])
  v, _ = denoise(bound, past, Frames(xs[0], step.sigma, step.positions))
  head = step.finish(xs[0], v, noise)
  _, tail = jax.lax.scan(together, (past, head[1]), (indices[1:], xs[1:]))
  return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), head, tail)


def initial_noise(noise: Noise, blocks: int, first: int = 0) -> jax.Array:
  """Returns the pure noise of `blocks` blocks from block `first` on: [n b k h w c]."""
  # lax.map, not vmap: the draws of one block at a time are in memory
  return jax.lax.map(lambda n: noise(0, n), first + jnp.arange(blocks))


def generate(
  bound: Bound, noise: Noise, past: Ring, blocks: int, first: int, *, fused: bool = True
):
  """Returns the clean latents [n b k h w c] of `blocks` blocks from block `first` on."""

  def next_level(xs, level):
    return sweep(bound, noise, past, xs, level, first=first, fused=fused)[0], None

  xs = initial_noise(noise, blocks, first)
  return jax.lax.scan(next_level, xs, jnp.arange(past.method.levels))[0]
