"""A lapped transform of images: what is cut into patches behind it overlaps its neighbours.

Before the cut an orthogonal filter acts on the P pixels that straddle each boundary of patches of P
(P / 2 on either side), along the rows and then along the columns (Tran, Liang, Tu, "Lapped
transform via time-domain pre- and post-filtering", IEEE TSP 51(6), 2003):

    F = W diag(I, V) W,   W = [[I, J], [J, -I]] / sqrt(2),   V = J C2^T C4 J

I is the identity and J the reversal of P / 2, C2 and C4 are the orthonormal DCTs of types II and
IV. The sum of a mirrored pair passes unchanged, so a constant stays one; differences are rotated.
Behind the inverse, F^T, a patch's components fade out in its neighbours instead of ending at its
edge: no squares are seen.
"""

import functools

import jax
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.types import Pixels


def forward(video: Pixels, patch: int) -> Pixels:
  """Filters pixels [b f H W 3], numpy's or jax's, before they are cut into patches."""
  for axis in (2, 3):
    video = _along(video, axis, matrix(video.shape[axis], patch).T)
  return video


def inverse(video: Pixels, patch: int) -> Pixels:
  """Undoes `forward`."""
  for axis in (2, 3):
    video = _along(video, axis, matrix(video.shape[axis], patch))
  return video


def check(patch: int) -> None:
  """Raises UserError for patches that have no middle, or too few pixels to be filtered."""
  if patch % 2 or patch < 4:
    raise UserError(
      f"codec.lapped with codec.patch = {patch}: expected an even number of pixels, at least 4"
    )


@functools.cache
def matrix(length: int, patch: int) -> np.ndarray:
  """Returns the filters of a side of `length` pixels as one matrix, float32 [length, length]."""
  made = np.eye(length)
  half = patch // 2
  for edge in range(patch, length, patch):  # not at the image's own edges
    made[edge - half : edge + half, edge - half : edge + half] = _filter(half)
  return made.astype(np.float32)


def _along(video: jax.Array, axis: int, factor: np.ndarray) -> jax.Array:
  return (video.swapaxes(axis, -1) @ factor).swapaxes(axis, -1)


def _filter(half: int) -> np.ndarray:
  """F of patches of 2 half pixels, float64."""
  identity = np.eye(half)
  reversal = identity[::-1]
  k, n = np.arange(half)[:, None], np.arange(half)[None]
  c2 = np.sqrt(2 / half) * np.cos(np.pi * k * (2 * n + 1) / (2 * half))
  c2[0] /= np.sqrt(2)
  c4 = np.sqrt(2 / half) * np.cos(np.pi * (2 * k + 1) * (2 * n + 1) / (4 * half))
  w = np.block([[identity, reversal], [reversal, -identity]]) / np.sqrt(2)
  middle = np.eye(2 * half)
  middle[half:, half:] = reversal @ c2.T @ c4 @ reversal
  return w @ middle @ w
