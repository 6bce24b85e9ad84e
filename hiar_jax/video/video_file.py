"""Clips of a video file: decoded in order, resampled in time by timestamps, resized and cropped."""

import collections
from collections.abc import Iterator
import dataclasses
import os

import av
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.video.frame_pixels import cover

# A file that decodes to less than this share of its declared frames counts as cut off; containers
# declare a few frames more or less than there are.
_TRUNCATED = 0.9
# Seconds between two timestamps may be off by this: Matroska rounds to milliseconds.
_ROUNDING = 1.1e-3


class Unusable(Exception):
  """The file gives no clip; the message says why."""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The clips to take: `frames` frames of height x width pixels at `fps`, a start every `stride`.

  stride: in frames at `fps`; below `frames`, clips overlap.

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
  """Decodes the whole file and returns its number of clips, at least 1.

  Raises:
    Unusable: damaged, cut off, without a picture, or too short for one clip.
    av.error.FFmpegError: not a video, or its data cannot be decoded.
  """
  with av.open(os.fspath(path)) as container:
    shown = sum(repeats for _, repeats in resampled(container, sampling.fps))
  if shown < sampling.frames:
    raise Unusable(
      f"too short: {shown} frames at {sampling.fps:g} frames a second, a clip needs "
      f"{sampling.frames}"
    )
  return (shown - sampling.frames) // sampling.stride + 1


def clips(path: str | os.PathLike, sampling: Sampling) -> Iterator[np.ndarray]:
  """Yields the clips of a file, uint8 [f H W 3] each, in one pass.

  Raises what `count_clips` raises, but yields nothing for a file too short for one clip.
  """
  window: collections.deque[np.ndarray] = collections.deque(maxlen=sampling.frames)
  index = 0
  with av.open(os.fspath(path)) as container:
    for frame, repeats in resampled(container, sampling.fps):
      # frames that the resampling skips are decoded, but not resized
      image = cover(frame, sampling.height, sampling.width) if repeats else None
      for _ in range(repeats):
        window.append(image)
        index += 1
        if index >= sampling.frames and (index - sampling.frames) % sampling.stride == 0:
          yield np.stack(window)


def resampled(
  container: av.container.InputContainer, fps: float
) -> Iterator[tuple[av.VideoFrame, int]]:
  """Yields (frame, repeats): how many of the times 0, 1/fps, 2/fps, ... show this frame.

  Times count from the first frame. A frame is shown until the next one, the last for its duration.
  Raises what `count_clips` raises, but for a file too short for one clip.
  """
  previous = None
  done = 0  # ticks that the frames so far fill
  times: list[float] = []
  for frame, time in _decoded(container):
    if previous is not None:
      due = _ticks(time - times[0], fps)
      # max: timestamps of damaged files may go back
      yield previous, max(0, due - done)
      done = max(done, due)
    previous = frame
    times.append(time)
  end = max(times) + _last_duration(container.streams.video[0], previous, times)
  yield previous, max(0, _ticks(end - times[0], fps) - done)


def _last_duration(stream: av.VideoStream, last: av.VideoFrame, times: list[float]) -> float:
  """How long the last frame is shown, in seconds: as it says itself, within what is known else."""
  duration = 1 / frame_rate(stream)
  if last.duration and last.time_base:
    duration = float(last.duration * last.time_base)
  # Durations are stored in the order of decoding. Where that is not the order of showing, a pause
  # may be told of a frame two or three before or after it.
  if stream.duration and stream.time_base:
    rest = float((stream.duration + (stream.start_time or 0)) * stream.time_base) - max(times)
    if rest > 0:
      return min(duration, rest)
  if stream.codec_context.has_b_frames and len(times) > 1:
    return min(duration, float(np.median(np.diff(times))))
  return duration


def _ticks(seconds: float, fps: float) -> int:
  """The number of the times 0, 1/fps, 2/fps, ... before `seconds`."""
  return int(np.ceil((seconds - _ROUNDING) * fps))


def frame_rate(stream: av.VideoStream) -> float:
  """The frames per second that a stream declares; 25 without any, as FFmpeg's default."""
  return float(stream.average_rate or stream.guessed_rate or 25)


def _decoded(container: av.container.InputContainer) -> Iterator[tuple[av.VideoFrame, float]]:
  """Yields every shown frame with its time in seconds.

  Raises:
    Unusable: no picture, damaged pictures, or fewer frames than the container declares.
  """
  if not container.streams.video:
    raise Unusable("no video stream")
  stream = container.streams.video[0]
  stream.thread_type = "AUTO"  # FFmpeg decodes on all cores
  rate = frame_rate(stream)
  count = hidden = 0
  for packet in container.demux(stream):
    # An edit list hides it, as where a film was trimmed without being encoded anew. The decoder
    # needs it for the frames that are shown, and keeps its own frame to itself.
    hidden += packet.is_discard
    for frame in packet.decode():
      if frame.is_corrupt:
        raise Unusable(f"damaged at frame {count}")
      yield frame, count / rate if frame.time is None else float(frame.time)
      count += 1
  if not count:
    raise Unusable("no picture in it")
  # stream.frames is 0 where the container declares no count
  if count < _TRUNCATED * (stream.frames - hidden):
    raise Unusable(f"cut off: {count} of {stream.frames - hidden} frames there")
