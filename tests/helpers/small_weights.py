"""Parameters of a few leaves in a weights directory, and a leaf that is read row by row."""

import jax
import numpy as np

from tests.helpers import tiny

PARAMS = {
  "layers": {"kernel": tiny.random(0, 3, 8, 4), "bias": tiny.random(1, 3, 4)},
  "scale": tiny.random(2, 5),
  "gain": np.asarray(1.5, np.float32),
  "zeros": np.zeros((2, 2), np.float32),
}
CONFIG = tiny.CONFIG


def assert_same(found, expected=PARAMS):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), b)


def chunks(directory):
  params = directory / "dit" / "params"
  return sorted(
    path for path in params.rglob("*") if path.is_file() and "c" in path.relative_to(params).parts
  )


class Rows:
  """A stack that remembers which rows were asked for."""

  def __init__(self, array):
    self.array, self.shape, self.dtype, self.size, self.asked = (
      array,
      array.shape,
      array.dtype,
      array.size,
      [],
    )

  def __getitem__(self, row):
    self.asked.append(row)
    return self.array[row]
