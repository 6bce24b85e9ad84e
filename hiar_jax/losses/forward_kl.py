"""The forward-KL term (HiAR, section 3.4): regression of the first steps on teacher trajectories.

It preserves motion: reverse KL (DMD) seeks modes and settles on little motion, and motion is fixed
at the highest noise levels. So the first K steps are regressed on the chord between two points of a
teacher's trajectory:

    L = mean | v_theta(x_i, t_i) - (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i) |^2        (Eq. 10)

In x0 form, with x0 = x_i - sigma_i v on both sides, L is sigma_i^2 times that (published code; the
same at the first step, where sigma is 1). `end` takes the trajectory's end as target instead. The
paper evaluates v_theta with full attention between frames (default), the published code with
block-causal attention.
"""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Bound, whole_clip
from hiar_jax.rollout.past.clip_groups import causal_groups
from hiar_jax.types import Points, typed

ATTENTIONS = ("bidirectional", "causal")
TARGETS = ("velocity", "x0", "end")


@typed
def forward_kl(
  bound: Bound,
  points: Points,
  step,
  sigmas: jax.Array,
  method: MethodConfig,
  *,
  attention: str = "bidirectional",
  target: str = "velocity",
  point_sigmas: jax.Array | None = None,
) -> jax.Array:
  """Returns L [b] for points [b s+1 f h w c] at step i in [0, s), which may be traced.

  sigmas [s + 1]: the student's levels. point_sigmas [s + 1]: the points' own levels, where the
  teacher's schedule does not meet the student's.
  """
  point_sigmas = sigmas if point_sigmas is None else point_sigmas
  x, x_next = points[:, step], points[:, step + 1]
  # all frames at one level, which is also the level of what they see
  if attention == "bidirectional":
    v = bound(whole_clip(x, sigmas[step])).velocity[0]
  else:
    v = jnp.concatenate(bound(causal_groups(x, sigmas[step], method)).velocity, axis=1)
  # the network is queried at the student's level even where the points lie at others, as published
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
