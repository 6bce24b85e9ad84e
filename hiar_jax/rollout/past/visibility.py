"""Masks [query frames, key frames]: the window and the sink, and causality between blocks.

True where the frame of the row sees the frame of the column. Example with blocks of 2 frames
(frames 0 1 | 2 3), no window:

    block_causal_mask   past_mask     own_block_mask
        1 1 0 0          0 0 0 0         1 1 0 0
        1 1 0 0          0 0 0 0         1 1 0 0
        1 1 1 1          1 1 0 0         0 0 1 1
        1 1 1 1          1 1 0 0         0 0 1 1
"""

import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.types import FrameMask, Positions


def block_end(positions: Positions, block: int) -> Positions:
  """Returns the last frame of the block that each frame belongs to."""
  return (positions // block + 1) * block - 1


def in_window(query: Positions, key: Positions, method: Method) -> FrameMask:
  """Returns the window rule of hiar_jax.method as a mask, without causality."""
  if not method.window:
    return jnp.ones((query.size, key.size), bool)
  # counted from the block's end, so that all frames of a block see the same past
  last_outside = block_end(query, method.block) - (method.window - method.sink)
  return (key[None, :] < method.sink) | (key[None, :] > last_outside[:, None])


def block_causal_mask(positions: Positions, method: Method) -> FrameMask:
  """Returns the mask under which frames see their own block and the blocks before it."""
  causal = positions[None, :] <= block_end(positions, method.block)[:, None]
  return causal & in_window(positions, positions, method)


def past_mask(query: Positions, past: Positions, method: Method) -> FrameMask:
  """Returns the mask under which frames see earlier blocks alone.

  past: positions of cached frames in any order, -1 where a slot is empty.
  """
  # < the first frame of the query's block: slots may still hold the block itself, or later ones
  earlier = past[None, :] < (query // method.block * method.block)[:, None]
  return earlier & (past >= 0)[None, :] & in_window(query, past, method)


def own_block_mask(query: Positions, key: Positions, method: Method) -> FrameMask:
  """Returns the mask under which frames see their own block alone."""
  return (query // method.block)[:, None] == (key // method.block)[None, :]


def teacher_forcing_mask(positions: Positions, method: Method) -> FrameMask:
  """Returns the mask [2 f, 2 f] over [context | noisy], both halves at `positions` [f].

  The context is block-causal; noisy block n sees the context's blocks < n and itself.
  """
  n = positions.size
  top = jnp.concatenate([block_causal_mask(positions, method), jnp.zeros((n, n), bool)], axis=1)
  bottom = jnp.concatenate(
    [past_mask(positions, positions, method), own_block_mask(positions, positions, method)],
    axis=1,
  )
  return jnp.concatenate([top, bottom], axis=0)
