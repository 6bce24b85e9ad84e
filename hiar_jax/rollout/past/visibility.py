"""Which frames a frame sees, as masks: the rule of the window and the sink, and block causality."""

import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.types import FrameMask, Positions


def block_end(positions: Positions, block: int) -> Positions:
  """Last frame of the block that each frame belongs to."""
  return (positions // block + 1) * block - 1


def in_window(query: Positions, key: Positions, method: Method) -> FrameMask:
  """The rule of the module's docstring, without causality: rows are queries, columns keys."""
  if not method.window:
    return jnp.ones((query.size, key.size), bool)
  oldest = block_end(query, method.block) - (method.window - method.sink)
  return (key[None, :] < method.sink) | (key[None, :] > oldest[:, None])


def block_causal_mask(positions: Positions, method: Method) -> FrameMask:
  """Every frame sees its own block and the blocks before it."""
  causal = positions[None, :] <= block_end(positions, method.block)[:, None]
  return causal & in_window(positions, positions, method)


def past_mask(query: Positions, past: Positions, method: Method) -> FrameMask:
  """Frames of the present see frames of earlier blocks; `past` entries of -1 are empty slots."""
  earlier = past[None, :] < (query // method.block * method.block)[:, None]
  return earlier & (past >= 0)[None, :] & in_window(query, past, method)


def own_block_mask(query: Positions, key: Positions, method: Method) -> FrameMask:
  """Frames see their own block alone."""
  return (query // method.block)[:, None] == (key // method.block)[None, :]


def teacher_forcing_mask(positions: Positions, method: Method) -> FrameMask:
  """For [context | noisy], both halves at `positions`: context is block-causal, noisy block n sees
  context < n and itself.
  """
  n = positions.size
  top = jnp.concatenate([block_causal_mask(positions, method), jnp.zeros((n, n), bool)], axis=1)
  bottom = jnp.concatenate(
    [past_mask(positions, positions, method), own_block_mask(positions, positions, method)],
    axis=1,
  )
  return jnp.concatenate([top, bottom], axis=0)
