"""A packed model's video while it is made: what is there after each step of its order."""

import pathlib

import numpy as np

from hiar_jax.generation.clips import Made, shown
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.video.contact_sheet import UNMADE, contact_sheet
from hiar_jax.video.mp4 import write_mp4
from hiar_jax.video.png import write_png


def frames_of(model: VideoModel, made: Made) -> tuple[np.ndarray, np.ndarray]:
  """Returns (the frames uint8 [F H W 3], which of them are made, bool [F]); the others are grey.

  A codec with a memory may show frames next to a gap a little otherwise than in the whole video.
  """
  clip, codec = made.clip, model.experiment.codec
  there = made.frames[None, :, None, None, None]
  frames = np.concatenate(list(shown(model, clip, np.where(there, made.latents, 0.0))))
  ends = [codec.pixel_frames(n) for n in range(1, 1 + clip.given + clip.frames)]
  known = np.repeat(made.frames[: len(ends)], np.diff([0, *ends]))
  known = np.concatenate([known, np.ones(len(frames) - len(known), bool)])
  frames[~known] = UNMADE
  return frames, known


class PartialVideos:
  """Writes beside each clip's file OUT.mp4, whenever a step is done: OUT.partial.mp4, what there is
  of the video, which goes when it is whole; and OUT.steps.png, a contact sheet with a row for each
  step so far. For clips.write_clips.
  """

  def __init__(self, model: VideoModel):
    self.model = model
    self._known: dict[pathlib.Path, list[np.ndarray]] = {}  # of each step so far, of open clips

  def __call__(self, made: Made) -> None:
    clip, config = made.clip, self.model.experiment.sample
    frames, known = frames_of(self.model, made)
    steps = self._known.setdefault(clip.path, [])
    steps.append(known)
    partial = clip.path.with_suffix(".partial.mp4")
    if made.frames.all():
      del self._known[clip.path]
      partial.unlink(missing_ok=True)
    else:
      write_mp4(partial, frames, config.fps, clip.provenance(self.model), scale=config.scale)
    rows = {f"step {n}: {k.sum()} of {len(k)} frames": k for n, k in enumerate(steps, 1)}
    # what is made stays as it is: each row is the last one, less what came later
    sheet = contact_sheet(dict.fromkeys(rows, frames), columns=15, title=clip.job.title, made=rows)
    write_png(clip.path.with_suffix(".steps.png"), sheet)
