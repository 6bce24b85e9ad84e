"""What the hard cases share: a small network, methods of every kind, and a measure of equality."""

import jax
import numpy as np

from hiar_jax import method as methods
from hiar_jax.types import LatentShape
from tests.helpers import tiny
from tests.seams import context, frames
from tests.seams.method import Method
from tests.seams.plain_wan import PlainWan
from tests.seams.ring import Ring

NETWORK = PlainWan(dim=16, heads=2, layers=2, freq_dim=8)
TOLERANCE = 2e-5  # of the largest value: two float32 programs of the same sums
LEVELS = {"output": context.Output(), "clean": context.Clean(), "input": context.Input()}


def method_of(row: methods.Method, sink_positions: str = "absolute") -> Method:
  """The new noun for a row of today's."""
  return Method(
    sigmas=tuple(float(s) for s in tiny.SIGMAS),
    block=row.block,
    order=row.order,
    context=LEVELS[row.level],
    gradient=row.gradient,
    window=row.window,
    sink=row.sink,
    sink_context=row.sink_level,
    sink_positions=sink_positions,
    renoise=row.renoise,
    past=Ring,
  )


def shape(latent_frames: int) -> LatentShape:
  return LatentShape(latent_frames, tiny.HEIGHT, tiny.WIDTH, tiny.CONFIG.channels)


def bound(text=None) -> frames.Bound:
  return frames.bind(NETWORK, tiny.params(), tiny.text() if text is None else text)


def noise_of(row: methods.Method, count: int):
  """(level, block) -> eps from a table; behind the method's levels stand the contexts' draws."""
  levels = 2 * tiny.SIGMAS.size
  table = tiny.random(
    7, levels, count, tiny.BATCH, row.block, tiny.HEIGHT, tiny.WIDTH, tiny.CONFIG.channels
  )
  return tiny.lookup(table)


def assert_close(new, old, what=""):
  assert jax.tree.structure(new) == jax.tree.structure(old), what
  for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, what
    error, largest = np.abs(a - b).max(), np.abs(b).max()
    assert error <= TOLERANCE * largest, f"{what}: off by {error:.3g}, largest {largest:.3g}"


ROWS = {
  "published": methods.Method(),
  "no window": methods.Method(window=0),
  "no past": methods.Method(window=3),
  "window inside blocks": methods.Method(window=7),
  "ring shorter than a block": methods.Method(window=5, sink=1),
  "sink": methods.Method(window=8, sink=2),
  "sink across blocks": methods.Method(window=9, sink=4),
  "euler": methods.Method(window=6, renoise="euler"),
  "clean context": methods.Method(window=9, level="clean"),
  "input": methods.Method(window=8, sink=1, level="input"),
  "clean sink": methods.Method(window=9, sink=3, level="input", sink_level="clean"),
  "block first": methods.Method(order="block_first", level="clean", window=8, sink=1),
}
