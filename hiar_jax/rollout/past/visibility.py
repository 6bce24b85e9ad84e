"""The window rule: which frames a block sees of earlier blocks, and the groups that follow from it.

Example with blocks of 2 frames and a window of 5, sink 1; rows are blocks, columns frames:

               0 1 | 2 3 | 4 5 | 6 7
    block 1    1 1
    block 2    1 .   1 1              window 5 - 1 = 4 frames, the block's own 2 among them
    block 3    1 .   . .   1 1
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Frames, Read
from hiar_jax.types import Positions, Video


def block_positions(n, method: MethodConfig) -> Positions:
  """Returns the frame indices [k] of block n, which may be traced."""
  return n * method.block + jnp.arange(method.block, dtype=jnp.int32)


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


def clip_reads(method: MethodConfig, n: int, sources: dict[int, Read]) -> tuple[Read, ...]:
  """Returns what block n of a clip reads. sources: block -> where its K/V are, in their order."""
  reads = []
  for m, source in sources.items():
    frames = m * method.block + np.arange(method.block)
    row = visible(method, n * method.block, frames)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))  # of runs of True
    reads += [
      dataclasses.replace(source, frames=(int(first), int(end)))
      for first, end in zip(edges[::2], edges[1::2], strict=True)
    ]
  return tuple(reads)


def block_groups(
  x: Video, sigma, method: MethodConfig, shown: list[dict[int, Read]]
) -> tuple[Frames, ...]:
  """Returns the blocks of a clip as groups. shown: of each, what it may see: block -> where."""
  sigma = jnp.asarray(sigma, jnp.float32)
  k = method.block
  return tuple(
    Frames(
      x[:, n * k : n * k + k],
      sigma[:, n * k : n * k + k] if sigma.ndim == 2 else sigma,
      block_positions(n, method),
      clip_reads(method, n, sources),
    )
    for n, sources in enumerate(shown)
  )


def causal_groups(x: Video, sigma, method: MethodConfig) -> tuple[Frames, ...]:
  """Returns the blocks of a clip as groups that see those before them, as they are here."""
  blocks = x.shape[1] // method.block
  return block_groups(x, sigma, method, [{m: Read(group=m) for m in range(blocks)}] * blocks)
