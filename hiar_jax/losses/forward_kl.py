"""The forward-KL term (HiAR, section 3.4): regress the first steps on the teacher's trajectories,
so that motion is not dropped.

Reverse KL seeks modes and settles on little motion; motion is fixed at the highest noise, so it
suffices to hold the first K steps to the teacher's chord between two points of its trajectory:

    L = mean | v_theta(x_i, t_i) - (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i) |^2        (Eq. 10)

In x0 form, with x0 = x_i - sigma_i v on both sides, L is sigma_i^2 times that. `end` takes the
trajectory's end as target instead. The paper evaluates it with full attention between frames
(default), the published code with block-causal attention.
"""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.method import Method
from hiar_jax.rollout.past.visibility import block_causal_mask
from hiar_jax.types import Points, typed

ATTENTIONS = ("bidirectional", "causal")
TARGETS = ("velocity", "x0", "end")


@typed
def forward_kl(
  forward,
  points: Points,
  step,
  sigmas: jax.Array,
  method: Method,
  *,
  attention: str = "bidirectional",
  target: str = "velocity",
  point_sigmas: jax.Array | None = None,
) -> jax.Array:
  """points [b s+1 f h w c], step i in [0, s) (may be traced) -> [b].

  sigmas [s+1]: the student's levels. point_sigmas: the levels at which the points really lie, where
  the teacher's differ.
  """
  point_sigmas = sigmas if point_sigmas is None else point_sigmas
  x, x_next = points[:, step], points[:, step + 1]
  positions = jnp.arange(x.shape[1], dtype=jnp.int32)
  mask = None if attention == "bidirectional" else block_causal_mask(positions, method)
  v, _ = forward(x, sigmas[step], positions, mask=mask)
  chord = (x_next - x) / (point_sigmas[step + 1] - point_sigmas[step])
  if target == "velocity":
    error = v - chord
  elif target == "x0":
    error = flow.x0_from_velocity(x, v, sigmas[step]) - flow.x0_from_velocity(
      x, chord, point_sigmas[step]
    )
  else:
    error = flow.x0_from_velocity(x, v, sigmas[step]) - points[:, -1]
  return jnp.mean(error**2, axis=range(1, x.ndim))
