"""The window rule: which frames a block sees of earlier blocks.

Example with blocks of 2 frames and a window of 5, sink 1; rows are blocks, columns frames:

               0 1 | 2 3 | 4 5 | 6 7
    block 1    1 1
    block 2    1 .   1 1              window 5 - 1 = 4 frames, the block's own 2 among them
    block 3    1 .   . .   1 1
"""

import jax.numpy as jnp
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.types import Positions


def block_positions(n, method: MethodConfig) -> Positions:
  """Returns the frame indices [k] of block n, which may be traced; numpy's for an int."""
  module = np if isinstance(n, int) else jnp
  return n * method.block + module.arange(method.block, dtype=jnp.int32)


def visible(method: MethodConfig, query, key):
  """Returns which frames `key` [p] the block of frame `query` sees of earlier blocks: Bool[p].

  numpy in, numpy out: reads of a whole clip are static. Traced in, traced out: slots of a ring,
  where -1 is an empty one.
  """
  first = query // method.block * method.block
  row = (key < first) & (key >= 0)
  if not method.window:
    return row
  # counted from the block's end, so that all its frames see the same past
  last_outside = first + method.block - 1 - (method.window - method.sink)
  return row & ((key < method.sink) | (key > last_outside))
