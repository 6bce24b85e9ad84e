"""Block-first order (Self-Forcing): each block is denoised to the end before the next starts."""

import jax
import jax.numpy as jnp

from hiar_jax.models.frames import Bound, Frames
from hiar_jax.rollout.blocks import Noise, Step, denoise, write_context
from hiar_jax.rollout.past.clip import ClipPast
from hiar_jax.rollout.past.ring import Ring


def denoise_block(bound: Bound, noise: Noise, past: Ring, n, exit_level):
  """Denoises block n from pure noise through the step at `exit_level` (may be traced).

  Returns (its input at that step, its context, its x0 prediction), each [b k h w c].
  """

  def predict(level, x):
    step = Step(past.method, level, n)
    v, _ = denoise(bound, past, Frames(x, step.sigma, step.positions))
    return step.finish(x, v, noise)

  # the exit step itself stands outside the loop, for its x0 and not only its next latent
  x = jax.lax.fori_loop(0, exit_level, lambda level, x: predict(level, x)[0], noise(0, n))
  _, context, x0 = predict(exit_level, x)
  return x, context, x0


def sweep(
  bound: Bound, noise: Noise, past: Ring | ClipPast, blocks: int, exit_level, *, first: int = 0
):
  """Denoises `blocks` blocks from block `first` on, each through the step at `exit_level`.

  Returns (the past with all of them, their inputs at that step, their contexts, their x0
  predictions), all but the first [n b k h w c].
  """

  def next_block(past, inputs):
    n, _ = inputs
    x, context, x0 = denoise_block(bound, noise, past, n, exit_level)
    step = Step(past.method, exit_level, n)
    shown = Frames(context, step.context_sigma, step.positions)
    return write_context(bound, past, shown), (x, context, x0)

  past, found = past.over_blocks(next_block, past, jnp.zeros(blocks), first)
  return past, *found


def generate(bound: Bound, noise: Noise, past: Ring, blocks: int, first: int) -> jax.Array:
  """Returns the clean latents [n b k h w c] of `blocks` blocks from block `first` on."""
  # the x0 of the last step, which goes down to sigma 0, is the clean latent
  return sweep(bound, noise, past, blocks, past.method.levels - 1, first=first)[3]
