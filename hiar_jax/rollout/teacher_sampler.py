"""The teacher's sampler: guided Euler steps on all frames at once."""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.rollout.blocks import Forward
from hiar_jax.types import Video


def trajectory(
  forward: Forward,
  negative: Forward,
  eps: Video,
  sigmas: jax.Array,
  keep: tuple[int, ...],
  guidance: float,
) -> jax.Array:
  """From eps at sigmas[0] down to sigmas[-1]; the points at the kept indices into `sigmas`: [b
  len(keep) f h w c].

  v = v_text + guidance (v_text - v_negative); `negative` is unused where guidance is 0.
  """
  positions = jnp.arange(eps.shape[1], dtype=jnp.int32)

  def one(x, j):
    v, _ = forward(x, sigmas[j], positions)
    if guidance:
      v = flow.guide(v, negative(x, sigmas[j], positions)[0], guidance)
    x = flow.euler(x, v, sigmas[j], sigmas[j + 1])
    return x, x

  _, points = jax.lax.scan(one, eps, jnp.arange(sigmas.size - 1))
  points = jnp.concatenate([eps[None], points])
  return jnp.moveaxis(points[jnp.asarray(keep)], 0, 1)
