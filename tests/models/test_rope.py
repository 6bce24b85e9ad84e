"""Rotary positions against complex128, from the first frame to the last that an index can hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import rope
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

FRAMES = [
  0,
  1,
  2,
  21,
  1023,
  1024,
  1025,
  65_535,
  1_000_000,
  2**20 - 1,
  2**20,
  2**20 + 1,
  123_456_789,
  2**30 - 1,
]


def reference(frames, rows: int, columns: int, head_dim: int) -> np.ndarray:
  """exp(i angle) [f, rows, columns, pairs] as Wan2.1 defines it: theta^(-2i / d) per axis with d =
  2 * pairs.
  """
  pairs = head_dim // 2
  parts = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
  grid = np.stack(
    np.meshgrid(frames, np.arange(rows), np.arange(columns), indexing="ij"), axis=-1
  ).astype(np.float64)
  angles = [
    grid[..., axis, None] / 10_000.0 ** (2 * np.arange(n) / (2 * n)) for axis, n in enumerate(parts)
  ]
  return np.exp(1j * np.concatenate(angles, axis=-1))


@pytest.mark.parametrize("pairs", [1, 2, 22, 43])
def test_frame_rotation_is_exact_at_any_frame(pairs):
  cos, sin = quick_jit(lambda at: rope.frame_rotation(at, pairs))(np.asarray(FRAMES, np.int32))
  angles = np.asarray(FRAMES, np.float64)[:, None] * rope.THETA ** (-np.arange(pairs) / pairs)
  expected = np.exp(1j * angles)
  np.testing.assert_allclose(cos, expected.real, rtol=0, atol=1e-6)
  np.testing.assert_allclose(sin, expected.imag, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_dim", [2, 8, 12, 16, 128])
def test_rotation_of_the_three_axes(head_dim):
  cos, sin = quick_jit(lambda at: rope.rotation(at, 3, 2, head_dim))(np.asarray(FRAMES, np.int32))
  assert cos.shape == sin.shape == (len(FRAMES), 6, 1, head_dim // 2) and cos.dtype == jnp.float32
  expected = reference(FRAMES, 3, 2, head_dim).reshape(len(FRAMES), 6, 1, -1)
  np.testing.assert_allclose(cos, expected.real, rtol=0, atol=1e-6)
  np.testing.assert_allclose(sin, expected.imag, rtol=0, atol=1e-6)


def test_heads_of_the_published_model_split_as_published():
  assert rope.split_pairs(128) == (22, 21, 21)


def test_pairs_turn_as_complex_numbers():
  x = tiny.random(1, 2, 3, 4, 2, 12)
  found = quick_jit(lambda x, at: rope.apply(x, *rope.rotation(at, 2, 2, 12)))(
    x, np.asarray([0, 7, 1_000_000], np.int32)
  )
  turned = (x[..., ::2] + 1j * x[..., 1::2]) * reference([0, 7, 1_000_000], 2, 2, 12).reshape(
    3, 4, 1, 6
  )
  expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_sixteen_bit_vectors_turn_in_float32():
  x = tiny.random(1, 1, 1, 4, 2, 12).astype(jnp.bfloat16)
  turn = quick_jit(lambda x: rope.apply(x, *rope.rotation(jnp.asarray([5]), 2, 2, 12)))
  turned = turn(x)
  assert turned.dtype == jnp.bfloat16
  exact = np.asarray(turn(x.astype(np.float32)))
  np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_products_depend_on_distance_alone():
  """q at frame m, k at frame n: q.k is the same for (m + 10^6, n + 10^6)."""
  q, k = (tiny.random(seed, 1, 4, 1, 1, 16) for seed in (1, 2))
  turn = quick_jit(lambda x, at: rope.apply(x, *rope.rotation(at, 1, 1, 16)))

  def products(start):
    at = start + np.arange(4, dtype=np.int32)
    a, b = (np.asarray(turn(x, at), np.float64)[0, :, 0, 0] for x in (q, k))
    return a @ b.T

  near = products(0)
  np.testing.assert_allclose(products(1_000_000), near, rtol=0, atol=1e-5)
  assert (
    np.abs(
      near - np.asarray(q, np.float64)[0, :, 0, 0] @ np.asarray(k, np.float64)[0, :, 0, 0].T
    ).max()
    > 0.1
  )
