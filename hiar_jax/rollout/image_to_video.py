"""Generation from one given latent frame, a picture, which stands alone before whole blocks
(Self-Forcing's `independent_first_frame`).

The published networks encode positions by rotations, which only differences of position enter. So
the lone frame is put at the last place of block 0, whose other frames are never there, and every
rule about blocks, windows and sinks holds as it stands.
"""

import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.rollout import block_first, step_first
from hiar_jax.rollout.blocks import Forward, Noise, join_blocks, write_context
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.types import Video


def rollout(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  first: Video,
) -> Video:
  """`blocks` new blocks after `first` [b 1 h w c], which is shown clean and comes first in the
  result: [b 1 + blocks k h w c].

  cache: an empty one for a video of 1 + blocks k frames. noise(level, block): the first new block
  is 1, as after a whole given block.
  """
  cache = write_context(
    forward, cache, first, 0.0, jnp.asarray([method.block - 1], jnp.int32), method
  )
  if method.order == "block_first":
    _, xs = block_first.sweep(
      forward, noise, cache, sigmas, method, blocks, len(sigmas) - 2, first=1
    )
  else:
    xs = step_first.levels(
      forward,
      noise,
      cache,
      step_first.start(noise, blocks, 1),
      sigmas,
      method,
      len(sigmas) - 1,
      first=1,
    )
  return jnp.concatenate([first, join_blocks(xs)], axis=1)
