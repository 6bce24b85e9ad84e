"""A sink that is carried along: its frames stand right before the window, however far the video has
come.

As published, the sink keeps its true distance, which grows without end. LongLive and Rolling
Forcing instead turn its keys on, so that it is always as far away as when the window first began to
roll. Keys are stored as they were rotated at their true positions, and a turned
copy is made for each use: nothing is turned twice, and no rounding adds up. Values hold no
position; what a place embedding told the network of the sink's true frame stays as it was.
"""

import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.models import rope
from hiar_jax.types import Positions

POSITIONS = ("absolute", "relative")


def check(method: Method) -> None:
  """Raises UserError where blocks would see the sink turned before it is in the cache."""
  least = (-(-method.sink // method.block) + 1) * method.block
  if method.window < least:
    raise UserError(
      f"window = {method.window} is too short to carry a sink of {method.sink} along: with "
      f"blocks of {method.block} frames it takes "
      f"at least {least}"
    )


def distance(positions: Positions, method: Method) -> jax.Array:
  """Frames by which the sink is moved on for the block at `positions`, a scalar: 0 until its window
  begins to roll.
  """
  return jnp.maximum(positions[-1] + 1 - method.window, 0)


def rotate(keys: jax.Array, frames: jax.Array) -> jax.Array:
  """Rotated keys [layers b s t a d] -> the same keys `frames` further on (a scalar, at least 0)."""
  pairs = keys.shape[-1] // 2
  moving = rope.split_pairs(keys.shape[-1])[0]
  cos, sin = rope.frame_rotation(frames.reshape(1), moving)
  cos = jnp.concatenate([cos[0], jnp.ones(pairs - moving)])[None, None, None]
  sin = jnp.concatenate([sin[0], jnp.zeros(pairs - moving)])[None, None, None]
  turned = rope.apply(keys.reshape(-1, *keys.shape[2:]), cos, sin)
  return turned.reshape(keys.shape)
