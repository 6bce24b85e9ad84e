"""Flow matching (arXiv 2210.02747): regression on the velocity of a noised clip.

Trains the teacher, and (on the student's own samples) the critic.
"""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.models.frames import Bound, whole_clip
from hiar_jax.types import Video, typed


def sample_sigma(keys: jax.Array, shift: float, low: float = 0.0, high: float = 1.0) -> jax.Array:
  """Draws one level per example [b]: uniform t, shifted (flow, Eq. 3), clamped to [low, high]."""
  t = jax.vmap(jax.random.uniform)(keys)  # one level for all frames of a clip
  return jnp.clip(flow.shift_sigma(t, shift), low, high)


@typed
def flow_matching(bound: Bound, x0: Video, eps: Video, sigma: jax.Array) -> jax.Array:
  """Returns mean |v_theta(x_t, t) - (eps - x0)|^2 (flow, Eq. 1-2): [b]; sigma [b] or [b f]."""
  v = bound(whole_clip(flow.add_noise(x0, eps, sigma), sigma)).velocity[0]
  return jnp.mean((v - flow.velocity_target(x0, eps)) ** 2, axis=range(1, x0.ndim))
