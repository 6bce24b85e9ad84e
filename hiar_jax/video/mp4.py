"""H.264 mp4 files with metadata (prompt, seed, ...) as JSON in the container's comment.

A file is written under a hidden temporary name in the same directory and renamed when it is
complete, so a path holds a whole file or nothing new.
"""

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
import io
import itertools
import json
import os
from pathlib import Path

import av
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.files import whole_file
from hiar_jax.video.foreign_files import Unusable, open_video
from hiar_jax.video.frames import checked_frames

BT709 = 1  # ITU-T H.273: the value of BT.709 as matrix, primaries and transfer function
# Where `yuv_frame` takes its chroma samples: in the middle of 2 x 2 pixels. Untagged H.264 means
# their left edge, and each reading of a video that is continued would move colours half a pixel.
SITING = {"chroma_sample_location": "center"}


def write_mp4(
  path,
  frames: np.ndarray | Iterable[np.ndarray],
  fps: float = 16,
  metadata: Mapping[str, str] | None = None,
  *,
  scale: int = 1,
  crf: int = 14,
) -> Path:
  """Encodes frames uint8 [f H W 3] as H.264 (yuv420p, BT.709), atomically, and returns the path.

  frames: an array, or an iterable of pieces of one video, which are encoded one by one and need not
    be in memory together; where it raises, no file is left.
  metadata: shown by `read_metadata` and `ffprobe -show_format`.
  scale: integer enlargement with nearest neighbour, for small videos.
  crf: x264's quality, 0 (best) .. 51.

  An odd side is padded to an even one with its last row or column. Raises UserError for another
  dtype or shape, no frames, or a scale or fps that is not positive.
  """
  path = Path(path)
  if not isinstance(scale, int) or scale < 1 or not fps > 0:
    raise UserError(
      f"{path}: scale is {scale!r} and fps is {fps!r}; give a whole scale >= 1 and fps > 0"
    )
  # the first piece ahead of the others: the encoder needs the size, and no file is opened for none
  pieces = iter([frames] if hasattr(frames, "shape") else frames)
  first = checked_frames(path, next(pieces, np.zeros((0, 0, 0, 3), np.uint8)))
  with whole_file(path) as file, _index_first(file) as container:
    container.metadata["comment"] = comment(metadata or {})
    # 1001: the denominator of the NTSC rates, as 30000/1001
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **SITING})
    # yuv420p holds chroma at half the size, so the sides are even
    height, width = (side * scale + side * scale % 2 for side in first.shape[1:3])
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    # tagged, since players guess BT.601 for small videos without a tag
    context.colorspace = context.color_primaries = context.color_trc = BT709
    for piece in itertools.chain([first], pieces):
      if checked_frames(path, piece).shape[1:] != first.shape[1:]:
        raise UserError(
          f"{path}: a piece has frames of {piece.shape[1:]}, the first one of {first.shape[1:]}; "
          "expected one size"
        )
      for frame in piece:
        container.mux(stream.encode(yuv_frame(frame, height, width, scale)))
    container.mux(stream.encode())  # the frames that x264 holds back for its lookahead
  return path


def _index_first(file: io.BufferedRandom) -> av.container.OutputContainer:
  """Opens a container whose index is moved before the frames when it is closed: a page plays such a
  file before all of it is there.
  """

  sink = _Sink(file)

  def again(url, flags, options) -> _Reader:  # FFmpeg moves them by reading what it has written
    return _Reader(sink)

  return av.open(sink, "w", format="mp4", options={"movflags": "+faststart"}, io_open=again)


class _Sink:
  """The file as FFmpeg writes it, which goes on after something has failed: of what fails then it
  would print the traceback. The first error is raised where the frame was given.
  """

  def __init__(self, file: io.BufferedRandom):
    self._file, self._failed = file, False
    self.tell, self.fileno = file.tell, file.fileno

  def write(self, content) -> int:
    return self._unless_failed(self._file.write, content, instead=len(content))

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    return self._unless_failed(self._file.seek, offset, whence, instead=offset)

  def flush(self) -> None:
    self._unless_failed(self._file.flush, instead=None)

  def _unless_failed(self, do: Callable, *given, instead: int | None) -> int | None:
    if self._failed:
      return instead
    try:
      return do(*given)
    except OSError:
      self._failed = True
      raise


class _Reader(io.RawIOBase):
  """Reads a file that is being written, from a place of its own."""

  def __init__(self, file: _Sink):
    file.flush()
    self._file, self._at = file, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    size = os.fstat(self._file.fileno()).st_size
    self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: size}[whence]
    return self._at

  def readinto(self, buffer) -> int:
    self._file.flush()
    count = os.preadv(self._file.fileno(), [buffer], self._at)
    self._at += count
    return count


def comment(metadata: Mapping[str, str]) -> str:
  """Returns metadata as the text of a container's comment; names of files may hold bytes that are
  not UTF-8, which become question marks.
  """
  text = json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)
  return text.encode(errors="replace").decode()


def read_metadata(path) -> dict | None:
  """Reads the metadata alone: {} for a file without a JSON comment, None for no video file."""
  try:
    with open_video(path) as container:
      if not container.streams.video:
        return None
      comment = container.metadata.get("comment", "")
  except (Unusable, av.error.FFmpegError):
    return None
  try:
    value = json.loads(comment)
  except ValueError:  # a comment that another program wrote
    return {}
  return value if isinstance(value, dict) else {}


def yuv_frame(frame: np.ndarray, height: int, width: int, scale: int) -> av.VideoFrame:
  """Converts a frame uint8 [H W 3], enlarged and padded to height x width, to yuv420p in BT.709."""
  # nearest neighbour: at scale >= 2 a pixel has chroma samples of its own and keeps its colour
  frame = frame.repeat(scale, 0).repeat(scale, 1)
  frame = np.pad(
    frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), mode="edge"
  )
  rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
  return rgb.reformat(format="yuv420p", dst_colorspace="ITU709")
