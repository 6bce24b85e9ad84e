"""What groups see as one mask over all frames, and a DiT called with such a mask, as its Linen
module takes it: around groups.
"""

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.attention.views import View, dense_mask
from hiar_jax.models.dit import DiT, DiTConfig
from hiar_jax.models.frames import Frames, frame_views


def views_of(mask) -> tuple[View, ...]:
  """A mask [f, p + f], which may be traced, as a view a frame; None = everything."""
  if mask is None:
    return ()
  everything = ((0, mask.shape[1]),)
  return tuple(View((i, i + 1), everything, jnp.asarray(row)) for i, row in enumerate(mask))


def frame_mask(groups: tuple[Frames, ...], past_frames: tuple[int, ...]) -> jax.Array | None:
  """What the groups see of [past | all groups] as one mask [f, p + f]; None: everything."""
  frames = sum(past_frames) + sum(g.x.shape[1] for g in groups)
  mask = dense_mask(frame_views(groups, past_frames), frames)
  return None if mask is None else jnp.asarray(mask)


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
      views_of(mask),
      past,
      start,
    )

  return forward
