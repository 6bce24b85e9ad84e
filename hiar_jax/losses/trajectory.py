"""Regression on the ends of teacher trajectories: the causal init, before distillation.

The block-causal student predicts x0 of points of a bidirectional teacher's ODE trajectories, as
CausVid and Self-Forcing initialise theirs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Bound
from hiar_jax.rollout.exit_step import block_causal, teacher_forcing
from hiar_jax.types import Points, Video, typed


@typed
def at_levels(trajectory: Points, levels: jax.Array) -> Video:
  """Picks each frame of trajectory [b s f h w c] at its level index [b f]: [b f h w c]."""
  index = levels[:, None, :, None, None, None]  # [b 1 f 1 1 1] against [b s f h w c]
  return jnp.take_along_axis(trajectory, index, axis=1)[:, 0]


def sample_levels(keys: jax.Array, count: int, frames: int, block: int, shared: bool) -> jax.Array:
  """Draws a level index in [0, count) per block, or one for all blocks if `shared`: [b f]."""
  shape = (1 if shared else frames // block,)
  # keys [b], one draw each: an example's levels do not depend on the rest of the batch
  drawn = jax.vmap(lambda key: jax.random.randint(key, shape, 0, count))(keys)
  return jnp.repeat(drawn, frames // drawn.shape[1], axis=1)


@typed
def trajectory(
  bound: Bound, points: Points, levels: jax.Array, sigmas: jax.Array, method: MethodConfig
) -> jax.Array:
  """Returns mean |x0_theta - end of the trajectory|^2 [b], blocks seeing each other as they are.

  points [b s+1 f h w c] at sigmas [s + 1]; levels [b f], one per block in the published code.
  """
  x = at_levels(points, levels)
  x0 = block_causal(bound, x, sigmas[levels], method)
  return jnp.mean((x0 - points[:, -1]) ** 2, axis=range(1, x.ndim))


@typed
def trajectory_with_history(
  bound: Bound,
  points: Points,
  levels: jax.Array,
  sigmas: jax.Array,
  method: MethodConfig,
  eps: Callable[[], Video],
) -> jax.Array:
  """Returns the loss of `trajectory` [b] with the context that `method` gives a block.

  The trajectory stands for the rollout: at the output level that is the predecessors' next point,
  at the clean level its end. eps: the noise of a context level that adds some.
  """
  context = method.context
  if context.free:
    return trajectory(bound, points, levels, sigmas, method)
  noisy, after, end = at_levels(points, levels), at_levels(points, levels + 1), points[:, -1]

  def noised(x0):
    return flow.add_noise(x0, eps(), context.sigma(sigmas[levels], sigmas[levels + 1]))

  shown = context.latent(noisy, after, end, noised)  # levels < s, so levels + 1 exists
  sigma, shown_sigma = sigmas[levels], context.sigma(sigmas[levels], sigmas[levels + 1])
  x0 = teacher_forcing(bound, shown, shown_sigma, noisy, sigma, method)
  return jnp.mean((x0 - end) ** 2, axis=range(1, noisy.ndim))
