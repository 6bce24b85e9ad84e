"""A DiT called with a mask over all its frames, as its Linen module takes it: around groups."""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.models.dit import DiT, DiTConfig


def bind(config: DiTConfig, params, text, start: jax.Array | None = None):
  """forward(x [b f h w c], sigma, positions [f], mask=None, past=None) -> (velocity, KV).

  sigma: a scalar, [b] or [b f]; mask: [f, p + f] over [past | own]; text: [b l d] or [b g l d].
  """

  def forward(x, sigma, positions, mask=None, past=None):
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma = sigma[:, None] if sigma.ndim == 1 else sigma
    levels = jnp.broadcast_to(sigma, x.shape[:2]) if sigma.ndim else jnp.full(x.shape[:2], sigma)
    return DiT(config).apply(
      {"params": params},
      jnp.asarray(x),
      flow.timestep(levels),
      jnp.asarray(text),
      positions,
      mask,
      past,
      start,
    )

  return forward
