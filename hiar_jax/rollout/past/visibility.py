"""Which frames a frame sees, as masks: the rule of the window and the sink, and block causality."""

import jax.numpy as jnp

from hiar_jax.method import History
from hiar_jax.types import FrameMask, Positions


def block_end(positions: Positions, block: int) -> Positions:
  """Last frame of the block that each frame belongs to."""
  return (positions // block + 1) * block - 1


def in_window(query: Positions, key: Positions, history: History) -> FrameMask:
  """The rule of the module's docstring, without causality: rows are queries, columns keys."""
  if not history.window:
    return jnp.ones((query.size, key.size), bool)
  oldest = block_end(query, history.block) - (history.window - history.sink)
  return (key[None, :] < history.sink) | (key[None, :] > oldest[:, None])


def block_causal_mask(positions: Positions, history: History) -> FrameMask:
  """Every frame sees its own block and the blocks before it."""
  causal = positions[None, :] <= block_end(positions, history.block)[:, None]
  return causal & in_window(positions, positions, history)


def past_mask(query: Positions, past: Positions, history: History) -> FrameMask:
  """Frames of the present see frames of earlier blocks; `past` entries of -1 are empty slots."""
  earlier = past[None, :] < (query // history.block * history.block)[:, None]
  return earlier & (past >= 0)[None, :] & in_window(query, past, history)


def own_block_mask(query: Positions, key: Positions, history: History) -> FrameMask:
  """Frames see their own block alone."""
  return (query // history.block)[:, None] == (key // history.block)[None, :]


def teacher_forcing_mask(positions: Positions, history: History) -> FrameMask:
  """For [context | noisy], both halves at `positions`: context is block-causal, noisy block n sees
  context < n and itself.
  """
  n = positions.size
  top = jnp.concatenate([block_causal_mask(positions, history), jnp.zeros((n, n), bool)], axis=1)
  bottom = jnp.concatenate(
    [past_mask(positions, positions, history), own_block_mask(positions, positions, history)],
    axis=1,
  )
  return jnp.concatenate([top, bottom], axis=0)
