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
from hiar_jax.rollout.past.clip import ClipPast
from hiar_jax.rollout.past.ring import Ring


def sweep(
  bound: Bound,
  noise: Noise,
  past: Ring | ClipPast,
  xs: jax.Array,
  level,
  *,
  first: int = 0,
  fused: bool = True,
):
  """Takes all blocks xs [n b k h w c] from `level` to the next.

  first: index of the first block (blocks before it are in `past`). fused: N forwards, all but one
  over two blocks, instead of 2 N over one. Returns (the past, xs at the next level, context
  latents, x0 predictions), all but the first [n b k h w c]; fused, the past lacks the last block.
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

  if method.context.free or not fused:
    past, found = past.over_blocks(separate, past, xs, first)
    return past, *found

  # the first block has no context to write, and nobody reads the context of the last
  step = Step(method, level, first)
  v, _ = denoise(bound, past, Frames(xs[0], step.sigma, step.positions))
  head = step.finish(xs[0], v, noise)
  if len(xs) == 1:
    return past, *(one[None] for one in head)
  (past, _), tail = past.over_blocks(together, (past, head[1]), xs[1:], first + 1)
  pairs = zip(head, tail, strict=True)
  return past, *(jnp.concatenate([one[None], others]) for one, others in pairs)


def show(bound: Bound, noise: Noise, past: ClipPast, xs: jax.Array, level):
  """Returns (contexts [n b k h w c], the past that holds them) of the first blocks of a clip, xs,
  from `level`: what the block after them sees.
  """
  past, _, contexts, _ = sweep(bound, noise, past, xs, level)
  if past.method.context.free:  # written already
    return contexts, past
  step = Step(past.method, level, len(xs) - 1)
  return contexts, write_context(
    bound, past, Frames(contexts[-1], step.context_sigma, step.positions)
  )


def initial_noise(noise: Noise, blocks: int, first: int = 0) -> jax.Array:
  """Returns the pure noise of `blocks` blocks from block `first` on: [n b k h w c]."""
  # lax.map, not vmap: the draws of one block at a time are in memory
  return jax.lax.map(lambda n: noise(0, n), first + jnp.arange(blocks))


def generate(
  bound: Bound, noise: Noise, past: Ring, blocks: int, first: int, *, fused: bool = True
):
  """Returns the clean latents [n b k h w c] of `blocks` blocks from block `first` on."""

  def next_level(xs, level):
    return sweep(bound, noise, past, xs, level, first=first, fused=fused)[1], None

  xs = initial_noise(noise, blocks, first)
  return jax.lax.scan(next_level, xs, jnp.arange(past.method.levels))[0]
