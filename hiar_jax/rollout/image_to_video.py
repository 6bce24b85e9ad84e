"""Generation from one given latent frame, an image, that stands alone before whole blocks.

Self-Forcing's published code calls this `independent_first_frame`. Networks see positions through
rotary embeddings, hence only differences of them. So the image takes the last position of block 0,
whose other frames never exist, and every rule about blocks, windows and sinks holds unchanged.
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
  image: Video,
) -> Video:
  """Generates `blocks` blocks after `image` [b 1 h w c], which is context at sigma 0.

  Returns [b 1 + blocks k h w c], the image in front.

  cache: an empty one for a video of 1 + blocks k frames. noise(level, block): the first new block
  is 1, as after a whole given block.
  """
  # position k - 1: the last of block 0
  cache = write_context(
    forward, cache, image, 0.0, jnp.asarray([method.block - 1], jnp.int32), method
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
  return jnp.concatenate([image, join_blocks(xs)], axis=1)
