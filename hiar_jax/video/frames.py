"""Frames as arrays: uint8 <-> [-1, 1] on the host, and the check before frames are written."""

import numpy as np

from hiar_jax.errors import UserError


def to_uint8(frames) -> np.ndarray:
  """Float frames in [-1, 1] of any shape -> uint8, rounded and clipped; uint8 is returned as is."""
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames
  return np.clip(np.rint((frames.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(frames) -> np.ndarray:
  """uint8 frames of any shape -> float32 in [-1, 1]; float frames are returned as float32."""
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames.astype(np.float32) / 127.5 - 1.0
  return frames.astype(np.float32)


def checked_frames(name, frames) -> np.ndarray:
  """Returns uint8 frames [f H W 3], f >= 1. Raises UserError, which begins with name, otherwise."""
  frames = np.asarray(frames)
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
    raise UserError(
      f"{name}: frames are {frames.dtype} {frames.shape}; expected uint8 [f, H, W, 3] with f >= 1"
    )
  return frames
