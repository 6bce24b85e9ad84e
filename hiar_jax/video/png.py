"""Frames as PNG files of a directory: 000000.png, 000001.png, ..."""

import io
import os
import pathlib
from pathlib import Path

import numpy as np
from PIL import Image

from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic, writing
from hiar_jax.video.frames import checked_frames


class PNGFolder:
  """A writer of frames uint8 [n H W 3], each file whole or not at all.

  keep: resumes after the first `keep` files and removes later ones; None starts an empty directory.

  Raises UserError where there are files already (without `keep`), or some of the first are missing.
  """

  def __init__(self, path: str | os.PathLike, *, keep: int | None = None):
    self.path = pathlib.Path(path)
    self.frames = keep or 0
    with writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      # other files of the directory, and temporary ones (.000007.png.tmp), are left alone
      there = sorted(entry for entry in self.path.glob("*.png") if entry.stem.isdigit())
    if there and keep is None:
      raise UserError(
        f"{self.path} holds {len(there)} pictures already; give another directory, or empty it"
      )
    if keep is not None and [int(entry.stem) for entry in there[:keep]] != list(range(keep)):
      raise UserError(
        f"{self.path} does not hold the first {keep} pictures; restore them, or start a new video"
      )
    for entry in there[self.frames :]:
      entry.unlink()

  def write(self, frames: np.ndarray) -> None:
    """Appends frames uint8 [n H W 3]; they are on the disk when this returns."""
    for frame in checked_frames(self.path, frames):
      write_png(self.path / f"{self.frames:06d}.png", frame)
      self.frames += 1


def write_png(path, image: np.ndarray) -> Path:
  """Writes an image uint8 [H W 3] or [H W] as PNG, atomically, and returns the path.

  Raises UserError for another dtype or shape.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3):
    raise UserError(
      f"{path}: image is {image.dtype} {image.shape}; expected uint8 [H, W, 3] or [H, W]"
    )
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return write_atomic(path, buffer.getvalue())
