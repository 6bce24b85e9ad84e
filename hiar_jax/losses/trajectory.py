"""Regression on the teacher's trajectories: the causal student learns where a noisy block ends (the
start of distillation).
"""

import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.rollout.exit_step import block_causal, teacher_forcing
from hiar_jax.types import Points, Video, typed


@typed
def at_levels(trajectory: Points, levels: jax.Array) -> Video:
  """trajectory [b s f h w c], levels [b f] -> each frame at its level [b f h w c]."""
  index = levels[:, None, :, None, None, None]
  return jnp.take_along_axis(trajectory, index, axis=1)[:, 0]


def sample_levels(keys: jax.Array, count: int, frames: int, block: int, shared: bool) -> jax.Array:
  """A level index in [0, count) per block (or one for all blocks): [b f]."""
  shape = (1 if shared else frames // block,)
  drawn = jax.vmap(lambda key: jax.random.randint(key, shape, 0, count))(keys)
  return jnp.repeat(drawn, frames // drawn.shape[1], axis=1)


@typed
def trajectory(
  forward, points: Points, levels: jax.Array, sigmas: jax.Array, method: Method
) -> jax.Array:
  """mean |x0_theta - end of the trajectory|^2, blocks seeing each other as they are (published: a
  level per block). [b]

  points [b s+1 f h w c] at sigmas [s+1]; levels [b f].
  """
  x = at_levels(points, levels)
  x0 = block_causal(forward, x, sigmas[levels], method)
  return jnp.mean((x0 - points[:, -1]) ** 2, axis=range(1, x.ndim))


@typed
def trajectory_with_history(forward, points: Points, levels, sigmas, method: Method) -> jax.Array:
  """The same, each block seeing its predecessors as `method` will show them: at the trajectory's
  next point, or its end. [b]
  """
  if method.level == "input":
    return trajectory(forward, points, levels, sigmas, method)
  last = sigmas.shape[0] - 1
  shown_levels = jnp.full_like(levels, last) if method.level == "clean" else levels + 1
  context, noisy = at_levels(points, shown_levels), at_levels(points, levels)
  x0 = teacher_forcing(forward, context, sigmas[shown_levels], noisy, sigmas[levels], method)
  return jnp.mean((x0 - points[:, -1]) ** 2, axis=range(1, noisy.ndim))
