"""The frames of a video file, as a player shows them."""

from collections.abc import Iterator
import itertools

import av
import numpy as np

from hiar_jax.video import video_file
from hiar_jax.video.frame_pixels import Look
from hiar_jax.video.mp4 import read_metadata


def read_mp4(path, *, scale: int = 1) -> tuple[np.ndarray, float, dict[str, str]]:
  """Decodes the first video stream: (frames uint8 [f H W 3], frames per second, metadata).

  scale: undoes that of `write_mp4` by the mean of each scale x scale square.
  """
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    frames, look = [], Look()
    for frame in container.decode(stream):
      frames.append(look.cover(frame, frame.height, frame.width))
    fps = float(stream.average_rate)
  frames = np.stack(frames)
  if scale > 1:
    f, height, width, _ = frames.shape
    h, w = height // scale, width // scale
    # the padding of odd sides is less than a square, and is dropped
    squares = frames[:, : h * scale, : w * scale].reshape(f, h, scale, w, scale, 3)
    frames = np.rint(squares.mean((2, 4))).astype(np.uint8)
  return frames, fps, read_metadata(path)


def clips(path, sampling: video_file.Sampling) -> Iterator[np.ndarray]:
  """The clips of a file, uint8 [f H W 3] each, one every `stride`."""
  starts = itertools.count(0, sampling.stride)
  return video_file.spans(path, sampling, ((at, sampling.frames) for at in starts))
