"""The critic (fake score of DMD): flow matching on clips that the student generates.

Its score follows the student's distribution while that moves.
"""

import jax

from hiar_jax.losses.flow_matching import flow_matching
from hiar_jax.models.frames import Bound
from hiar_jax.types import Video


def critic(bound: Bound, generated: Video, eps: Video, sigma: jax.Array) -> jax.Array:
  """Returns the flow-matching loss [b] on generated clips; no gradient reaches the generator."""
  return flow_matching(bound, jax.lax.stop_gradient(generated), eps, sigma)
