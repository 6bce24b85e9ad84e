"""What a video starts from, as the model takes it: an image's one latent frame, or whole blocks of
a video's last frames.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.generation.prompts_file import Job
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import foreign, lengths


@dataclasses.dataclass(frozen=True)
class Conditioning:
  """The file, what it is, and its content's hash.

  last: so many frames of a video, those at its end, are kept at most; None: all.
  """

  path: pathlib.Path
  kind: str  # "image" or "video"
  last: int | None = None

  @staticmethod
  def of(job: Job) -> "Conditioning | None":
    """What a job starts from."""
    if job.image:
      return Conditioning(job.image, "image")
    return Conditioning(job.video, "video") if job.video else None

  @property
  def digest(self) -> str:
    with open(self.path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()[:16]

  def read(self, e: Experiment) -> tuple[np.ndarray, str]:
    """(uint8 [F H W 3] at the experiment's size, what was done to it in a line, '' for nothing).

    An image is one frame. Of a video the most whole blocks are kept, those at its end, since it
    goes on from there. Raises UserError where the file is not what it should be, or too short for a
    block.
    """
    if self.kind == "image":
      return foreign.read_image(self.path, e.data.height, e.data.width)
    frames, said = foreign.read_video(
      self.path, e.data.height, e.data.width, e.sample.fps, self.last
    )
    kept, _ = lengths.crop_to_blocks(len(frames), e.history.block, e.pixel_frames)
    if not kept:
      least = e.pixel_frames(e.history.block)
      raise UserError(
        f"{self.path} has {len(frames)} frames at {e.sample.fps:g} a second, a start needs whole "
        f"blocks, at least {least} frames; "
        "give a longer video, or one frame of it as an image"
      )
    if kept < len(frames):
      left = f"its last {kept} of {len(frames)} frames, which are whole blocks"
      said = f"{said}, {left}" if said else f"{self.path.name}: {left}"
    return frames[-kept:], said


def latent_frames(pixels: np.ndarray, e: Experiment) -> int:
  """Latent frames of what `Start.read` returned."""
  return e.latent_frames(len(pixels))
