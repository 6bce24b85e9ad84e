"""The critic (fake score): flow matching on what the student generates, so that its score follows
the student's distribution.
"""

import jax

from hiar_jax.losses.flow_matching import flow_matching
from hiar_jax.types import Video


def critic(forward, generated: Video, eps: Video, sigma: jax.Array) -> jax.Array:
  """Flow matching on generated clips; no gradient reaches the generator. [b]"""
  return flow_matching(forward, jax.lax.stop_gradient(generated), eps, sigma)
