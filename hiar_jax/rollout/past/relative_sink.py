"""A sink at relative positions: its frames stand right before the window at every block.

At absolute positions, as published, the distance from a block to the sink grows without end.
LongLive and Rolling Forcing instead move the sink's rotary positions along, so that the distance
stays what it was when the window first began to roll. The cache holds keys rotated at their true
positions, and each use rotates a copy of them further: no key is rotated twice, so rounding does
not accumulate. Values hold no position. A place embedding (dit.DiTConfig), added before the layers,
keeps the sink's true position in keys and values.
"""

import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.models import rope
from hiar_jax.types import Positions

POSITIONS = ("absolute", "relative")


def check(method: Method) -> None:
  """Raises UserError where blocks would see the sink moved before it is in the cache."""
  least = (-(-method.sink // method.block) + 1) * method.block  # the sink's blocks and one more
  if method.window < least:
    raise UserError(
      f"window = {method.window} is too short to carry a sink of {method.sink} along: with "
      f"blocks of {method.block} frames it takes "
      f"at least {least}"
    )


def distance(positions: Positions, method: Method) -> jax.Array:
  """Returns by how many frames the sink is moved for the block at `positions`: a scalar >= 0.

  0 until the block's window begins to roll.
  """
  return jnp.maximum(positions[-1] + 1 - method.window, 0)


def rotate(keys: jax.Array, frames: jax.Array) -> jax.Array:
  """Moves rotated keys [num_layers b s t a d] on by `frames`, a scalar >= 0; s counts frames."""
  pairs = keys.shape[-1] // 2
  frame_pairs = rope.split_pairs(keys.shape[-1])[0]
  cos, sin = rope.frame_rotation(frames.reshape(1), frame_pairs)
  # the pairs of row and column stay: rotation by 0; axes [f t a pairs], as rope.apply takes them
  cos = jnp.concatenate([cos[0], jnp.ones(pairs - frame_pairs)])[None, None, None]
  sin = jnp.concatenate([sin[0], jnp.zeros(pairs - frame_pairs)])[None, None, None]
  # rope.apply has one batch axis: layers and batch become one
  rotated = rope.apply(keys.reshape(-1, *keys.shape[2:]), cos, sin)
  return rotated.reshape(keys.shape)
