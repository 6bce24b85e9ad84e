"""What the hard cases share: a plain network, methods of every kind, and what was recorded.

recorded.npz holds what the loops gave before they were written over groups of frames: with masks
over a whole forward of models.dit, on the same parameters, noise and texts.
"""

import functools
import pathlib

import jax
import numpy as np

from hiar_jax.method import Method, MethodConfig
from hiar_jax.models import frames
from hiar_jax.types import LatentShape
from tests.helpers import tiny
from tests.seams.plain_wan import PlainWan

NETWORK = PlainWan(dim=16, heads=2, layers=2, freq_dim=8)
TOLERANCE = 2e-5  # of the largest value: two float32 programs of the same sums


def method_of(row: MethodConfig, sink_positions: str = "absolute") -> Method:
  return row.at(tiny.SIGMAS, sink_positions)


def shape(latent_frames: int) -> LatentShape:
  return LatentShape(latent_frames, tiny.HEIGHT, tiny.WIDTH, tiny.CONFIG.channels)


def bound(text=None) -> frames.Bound:
  return frames.bind(NETWORK, tiny.params(), tiny.text() if text is None else text)


def noise_of(row: MethodConfig, count: int):
  """(level, block) -> eps from a table; behind the method's levels stand the contexts' draws."""
  levels = 2 * tiny.SIGMAS.size
  table = tiny.random(
    7, levels, count, tiny.BATCH, row.block, tiny.HEIGHT, tiny.WIDTH, tiny.CONFIG.channels
  )
  return tiny.lookup(table)


@functools.cache
def recorded() -> dict[str, np.ndarray]:
  with np.load(pathlib.Path(__file__).with_name("recorded.npz")) as arrays:
    return dict(arrays)


def assert_close(new, old, what=""):
  """old: an array, or the name of a recorded one."""
  old = recorded()[old] if isinstance(old, str) else old
  assert jax.tree.structure(new) == jax.tree.structure(old), what
  for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, what
    error, largest = np.abs(a - b).max(), np.abs(b).max()
    assert error <= TOLERANCE * largest, f"{what}: off by {error:.3g}, largest {largest:.3g}"


ROWS = {
  "published": MethodConfig(),
  "no window": MethodConfig(window=0),
  "no past": MethodConfig(window=3),
  "window inside blocks": MethodConfig(window=7),
  "ring shorter than a block": MethodConfig(window=5, sink=1),
  "sink": MethodConfig(window=8, sink=2),
  "sink across blocks": MethodConfig(window=9, sink=4),
  "euler": MethodConfig(window=6, renoise="euler"),
  "clean context": MethodConfig(window=9, level="clean"),
  "input": MethodConfig(window=8, sink=1, level="input"),
  "clean sink": MethodConfig(window=9, sink=3, level="input", sink_level="clean"),
  "block first": MethodConfig(order="block_first", level="clean", window=8, sink=1),
}
