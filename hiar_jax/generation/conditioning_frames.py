"""Conditioning frames, which a generated video continues or, of a packed model, ends with.

An image is one latent frame; of a video the last whole blocks are used, for a packed model all
whole latent frames.
"""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import conditioning_files, lengths
from hiar_jax.video.isolated_reader import IsolatedReader


@dataclasses.dataclass(frozen=True)
class Conditioning:
  """An image or a video file whose frames a generated video starts with.

  last: the number of frames kept at most, those at the video's end; None keeps all. is_end: the
  generated video ends with them.
  """

  path: pathlib.Path
  kind: str  # "image" or "video"
  last: int | None = None
  is_end: bool = False

  @staticmethod
  def of(
    image: str | os.PathLike | None, video: str | os.PathLike | None, *, is_end: bool = False
  ) -> "Conditioning | None":
    """The conditioning of an image or of a video, None where there is neither."""
    path, kind = (image, "image") if image else (video, "video")
    return Conditioning(pathlib.Path(path), kind, is_end=is_end) if path else None

  @property
  def digest(self) -> str:
    """16 hex digits of the file's SHA-256: the path alone would not notice a changed picture."""
    with open(self.path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()[:16]

  def read(self, e: Experiment, reader: IsolatedReader | None = None) -> tuple[np.ndarray, str]:
    """Reads (pixels uint8 [F H W 3] at the experiment's size, a message on what was changed or '').

    F is 1 for an image; of a video it is the most whole blocks. reader: reads the file in another
    process; None: this one does. Raises UserError where the file cannot be read, or has less than
    one block.
    """
    files = reader or conditioning_files
    if self.kind == "image":
      return files.read_image(self.path, e.data.height, e.data.width)
    frames, message = files.read_video(
      self.path, e.data.height, e.data.width, e.sample.fps, self.last
    )
    # A cache is filled block by block, so a video is cut to whole blocks, at its beginning: the new
    # frames follow its end. A packed model reads any frames.
    block = 1 if e.framepack else e.history.block
    kept, _ = lengths.crop_to_blocks(len(frames), block, e.codec.pixel_frames)
    if not kept:
      least = e.codec.pixel_frames(e.history.block)
      raise UserError(
        f"{self.path} has {len(frames)} frames at {e.sample.fps:g} a second, a start needs whole "
        f"blocks, at least {least} frames; "
        "give a longer video, or one frame of it as an image"
      )
    if kept < len(frames):
      side = "first" if self.is_end else "last"
      whole = "latent frames" if e.framepack else "blocks"
      cropped = f"its {side} {kept} of {len(frames)} frames, which are whole {whole}"
      message = f"{message}, {cropped}" if message else f"{self.path.name}: {cropped}"
    return frames[:kept] if self.is_end else frames[-kept:], message
