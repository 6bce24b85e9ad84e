"""A method bound to its levels, and which earlier frames its blocks see."""

import dataclasses
from typing import Any

import numpy as np

from tests.seams.context import ContextLevel, Output
from tests.seams.frames import Read


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the family (hiar_jax.method), with its levels.

  sigmas: the student's levels [s + 1]. context: how a block shows itself; sink_context: `history`,
  as any other frame, or `clean`: the sink's blocks are generated first and shown at sigma 0.
  sink_positions: `absolute`, or `relative` to the window. past: the class that keeps K/V.
  """

  sigmas: tuple[float, ...]
  block: int = 3
  order: str = "step_first"
  context: ContextLevel = Output()
  gradient: str = "detached"
  window: int = 21
  sink: int = 0
  sink_context: str = "history"
  sink_positions: str = "absolute"
  renoise: str = "fresh"
  past: Any = None

  @property
  def levels(self) -> int:
    return len(self.sigmas) - 1

  @property
  def clean_sink(self) -> int:
    """Frames generated first and then seen at sigma 0."""
    return self.sink if self.sink_context == "clean" and self.order == "step_first" else 0

  @property
  def moves_sink(self) -> bool:
    return self.sink_positions == "relative" and self.sink > 0 and self.window > 0

  def past_frames(self, frames: int) -> int:
    """Past frames that a video of `frames` latent frames needs."""
    return min(self.window or frames, frames) - self.block if frames > self.block else 0

  def visible(self, query, key):
    """Returns which frames `key` [p] the block of frame `query` sees of earlier blocks: Bool[p].

    numpy in, numpy out: the training forward's reads are static. Traced in, traced out: a ring's.
    """
    first = query // self.block * self.block
    row = (key < first) & (key >= 0)
    if not self.window:
      return row
    # counted from the block's end, so that all frames of a block see the same past
    outside = first + self.block - 1 - (self.window - self.sink)
    return row & ((key < self.sink) | (key > outside))


def static_reads(method: Method, n: int, shown: dict[int, Read]) -> tuple[Read, ...]:
  """Returns what block n sees of other blocks in a forward over a whole clip.

  shown: block -> where its K/V are, in the order in which their K/V stand.
  """
  reads = []
  for m, place in shown.items():
    frames = m * method.block + np.arange(method.block)
    row = np.concatenate([[False], method.visible(n * method.block, frames), [False]])
    edges = np.flatnonzero(np.diff(row))  # runs of True begin and end here
    reads += [
      dataclasses.replace(place, frames=(int(a), int(b)))
      for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
  return tuple(reads)
