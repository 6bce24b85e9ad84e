"""One video file as clips: decoded in order, resampled in time by its timestamps, resized and
cropped to cover.
"""

import collections
from collections.abc import Iterator
import dataclasses
import os

import av
import numpy as np

from hiar_jax.errors import UserError

# a file that decodes to less than this share of the frames it declares was cut off
_TRUNCATED = 0.9


class Unusable(Exception):
  """The file gives no clip; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The clips wanted: `frames` frames of height x width pixels at `fps`, one starting every
  `stride` frames.

  Raises:
    UserError: a number that is not positive.
  """

  frames: int
  height: int
  width: int
  fps: float
  stride: int

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise UserError(f"video clips with {name}={value} asked for; it must be positive")


def count_clips(path: str | os.PathLike, sampling: Sampling) -> int:
  """Decodes the whole file. Returns how many clips it gives, at least 1.

  Raises:
    Unusable: damaged, cut off, without a picture, or too short for one clip.
    av.error.FFmpegError: not a video, or its data cannot be decoded.
  """
  shown = sum(repeats for _, repeats in _resampled(path, sampling.fps))
  if shown < sampling.frames:
    raise Unusable(
      f"too short: {shown} frames at {sampling.fps:g} frames a second, a clip needs "
      f"{sampling.frames}"
    )
  return (shown - sampling.frames) // sampling.stride + 1


def clips(path: str | os.PathLike, sampling: Sampling) -> Iterator[np.ndarray]:
  """The clips of a file, uint8 [f, H, W, 3] each, reading forward once.

  Raises what `count_clips` raises.
  """
  window: collections.deque[np.ndarray] = collections.deque(maxlen=sampling.frames)
  index = 0
  for frame, repeats in _resampled(path, sampling.fps):
    image = _cover(frame, sampling.height, sampling.width) if repeats else None
    for _ in range(repeats):
      window.append(image)
      index += 1
      if index >= sampling.frames and (index - sampling.frames) % sampling.stride == 0:
        yield np.stack(window)


def _resampled(path: str | os.PathLike, fps: float) -> Iterator[tuple[av.VideoFrame, int]]:
  """Each frame, and at how many of the times 0, 1/fps, 2/fps, ... it is the one on screen."""
  previous, done = None, 0
  start = end = 0.0
  for frame, time, duration in _decoded(path):
    if previous is None:
      start = time
    else:
      due = _ticks(time - start, fps)
      yield previous, max(0, due - done)
      done = max(done, due)
    previous, end = frame, max(end, time - start + duration)
  yield previous, max(0, _ticks(end, fps) - done)


def _ticks(seconds: float, fps: float) -> int:
  """How many of the times 0, 1/fps, 2/fps, ... lie before `seconds`.

  Timestamps are rounded, hence the tolerance.
  """
  return int(np.ceil(seconds * fps - 1e-3))


def _decoded(path: str | os.PathLike) -> Iterator[tuple[av.VideoFrame, float, float]]:
  """Every frame with its time and duration in seconds.

  Raises:
    Unusable: no picture, damaged pictures, or fewer frames than the container declares.
  """
  with av.open(os.fspath(path)) as container:
    if not container.streams.video:
      raise Unusable("no video stream")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    count = 0
    for frame in container.decode(stream):
      if frame.is_corrupt:
        raise Unusable(f"damaged at frame {count}")
      time = count / rate if frame.time is None else float(frame.time)
      duration = (
        float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / rate
      )
      yield frame, time, duration
      count += 1
    if not count:
      raise Unusable("no picture in it")
    if count < _TRUNCATED * stream.frames:
      raise Unusable(f"cut off: {count} of {stream.frames} frames there")


def _cover(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
  """Upright, scaled until it covers height x width with its shape kept, centre cropped.

  uint8 [H, W, 3].
  """
  sideways = frame.rotation % 180 != 0
  box_h, box_w = (width, height) if sideways else (height, width)
  scale = max(box_h / frame.height, box_w / frame.width)
  new_h, new_w = max(box_h, round(frame.height * scale)), max(box_w, round(frame.width * scale))
  how = "AREA" if scale < 1 else "BICUBIC"
  image = frame.reformat(width=new_w, height=new_h, format="rgb24", interpolation=how).to_ndarray()
  top, left = (new_h - box_h) // 2, (new_w - box_w) // 2
  image = image[top : top + box_h, left : left + box_w]
  return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
