"""Rotary position embeddings over (frame, row, column), exact for any frame index.

RoPE (arXiv 2104.09864) as in Wan2.1 (arXiv 2503.20314): a head's d / 2 pairs, seen as complex
numbers, split into three groups for frame, row and column; pair i of a group of m rotates by
position * 10000^(-i / m).

Deviation: the published table ends at 1,024 frames. Here a frame index is written in base 1,024 and
the rotations of its three digits, tabulated in float64, are multiplied. Every angle is right to
float32 rounding up to frame 2^30, where a float32 product position * frequency would already be
wrong by 0.1 radian at frame 1,000,000.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.types import Positions

THETA = 10_000.0  # as Wan2.1
BASE = 1_024
DIGITS = 3  # 1,024^3 = 2^30 frames


def split_pairs(head_dim: int) -> tuple[int, int, int]:
  """Returns the pairs for (frame, row, column), as in Wan2.1: the frame gets the remainder."""
  pairs = head_dim // 2
  return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def frequencies(pairs: int, theta: float = THETA) -> np.ndarray:
  """Returns radians per step of position [pairs], float64."""
  return theta ** (-np.arange(pairs, dtype=np.float64) / pairs)


@functools.lru_cache
def _digit_tables(pairs: int, theta: float) -> np.ndarray:
  """Returns exp(i digit BASE^place frequency): complex128 [DIGITS, BASE, pairs]."""
  digits = np.arange(BASE, dtype=np.float64)[None, :, None]
  places = float(BASE) ** np.arange(DIGITS)[:, None, None]
  return np.exp(1j * digits * places * frequencies(pairs, theta))


def frame_rotation(
  positions: Positions, pairs: int, theta: float = THETA
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin), each [f, pairs] float32, of frame indices in [0, 2^30)."""
  tables = _digit_tables(pairs, theta)
  real, imag = tables.real.astype(np.float32), tables.imag.astype(np.float32)
  cos, sin = jnp.ones((positions.size, pairs)), jnp.zeros((positions.size, pairs))
  # rotations compose: (cos + i sin) times the rotation of each digit
  for place in range(DIGITS):
    digit = (positions // BASE**place) % BASE
    c, s = jnp.asarray(real[place])[digit], jnp.asarray(imag[place])[digit]
    cos, sin = cos * c - sin * s, cos * s + sin * c
  return cos, sin


def rotation(
  positions: Positions,
  rows: int,
  columns: int,
  head_dim: int,
  split: tuple[int, int, int] | None = None,
  theta: float = THETA,
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin), each [f, rows * columns, 1, head_dim / 2] float32, for `apply`.

  split: pairs for (frame, row, column), by default Wan2.1's.
  """
  pairs_f, pairs_h, pairs_w = split or split_pairs(head_dim)
  parts = []
  for frame, axis in zip(frame_rotation(positions, pairs_f, theta), (np.cos, np.sin), strict=True):
    row = axis(np.arange(rows)[:, None] * frequencies(pairs_h, theta)).astype(np.float32)
    column = axis(np.arange(columns)[:, None] * frequencies(pairs_w, theta)).astype(np.float32)
    grid = (positions.size, rows, columns)
    part = jnp.concatenate(
      [
        jnp.broadcast_to(frame[:, None, None, :], (*grid, pairs_f)),
        jnp.broadcast_to(row[None, :, None, :], (*grid, pairs_h)),
        jnp.broadcast_to(column[None, None, :, :], (*grid, pairs_w)),
      ],
      axis=-1,
    )
    # tokens of a frame in raster order, as dit.DiT flattens them; one entry for all heads
    parts.append(part.reshape(positions.size, rows * columns, 1, -1))
  return parts[0], parts[1]


def pooled_rotation(
  positions: jax.Array,
  rows: int,
  columns: int,
  head_dim: int,
  pool: int,
  split: tuple[int, int, int] | None = None,
  theta: float = THETA,
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin) of packed frames, each [1 or b, n, 1, head_dim / 2] float32.

  Cosines and sines of the patches that a kernel of pool^3 patches covers are averaged, each by
  itself, and not normalised (FramePack, section 3.1, and its code); the last frame, row and column
  are repeated up to whole kernels. positions: [k] or [b k] frame indices. split, theta: see
  `rotation`.
  """

  def of_clip(positions):
    parts = rotation(positions, rows, columns, head_dim, split, theta)
    return tuple(
      pool_patches(part.reshape(-1, rows, columns, head_dim // 2), pool) for part in parts
    )

  cos, sin = jax.vmap(of_clip)(positions if positions.ndim == 2 else positions[None])
  return cos[..., None, :], sin[..., None, :]


def pool_patches(x: jax.Array, pool: int) -> jax.Array:
  """Averages x [k rows columns d] over kernels of pool^3, its edges repeated: [n d], n in raster
  order.
  """
  x = pad_to_kernel(x, (pool,) * 3)
  k, rows, columns, d = x.shape
  x = x.reshape(k // pool, pool, rows // pool, pool, columns // pool, pool, d)
  return x.mean(axis=(1, 3, 5)).reshape(-1, d)


def pad_to_kernel(x: jax.Array, kernel: tuple[int, int, int]) -> jax.Array:
  """Repeats the last frame, row and column of x [... k rows columns d] up to whole kernels."""
  widths = [(0, -size % step) for size, step in zip(x.shape[-4:-1], kernel, strict=True)]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 4) + widths + [(0, 0)], mode="edge")


def apply(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs (2i, 2i + 1) of x [b f t a head_dim] in float32; returns x's dtype.

  cos, sin: [f t 1 pairs] for all clips, or [b f t 1 pairs].
  """
  # neighbours pair up (Wan2.1, interleaved), not the halves of a head
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  real, imag = pairs[..., 0], pairs[..., 1]
  if cos.ndim == 4:
    cos, sin = cos[None], sin[None]
  rotated = jnp.stack([real * cos - imag * sin, real * sin + imag * cos], axis=-1)
  return rotated.reshape(x.shape).astype(x.dtype)


def move(keys: jax.Array, frames: jax.Array) -> jax.Array:
  """Moves rotated keys [... f t a head_dim] on by `frames`, a scalar >= 0."""
  pairs = keys.shape[-1] // 2
  frame_pairs = split_pairs(keys.shape[-1])[0]
  cos, sin = frame_rotation(frames.reshape(1), frame_pairs)
  # the pairs of row and column stay: rotation by 0; axes [f t a pairs], as `apply` takes them
  cos = jnp.concatenate([cos[0], jnp.ones(pairs - frame_pairs)])[None, None, None]
  sin = jnp.concatenate([sin[0], jnp.zeros(pairs - frame_pairs)])[None, None, None]
  # `apply` has one batch axis: all leading ones become one
  return apply(keys.reshape(-1, *keys.shape[-4:]), cos, sin).reshape(keys.shape)
