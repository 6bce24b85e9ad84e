"""An MP4 that plays while it grows: H.264 in fragments (ISO/IEC 14496-12, 8.8), each whole and on
the disk before the next one starts.

A process that dies leaves a file that plays up to its last whole fragment, and that can be gone on
with. FFmpeg writes every box; what is done here is to take a fragment out as soon as its last frame
is in (the muxer alone would keep it until the next one begins), to put the fragment's place in time
into it, and to write it so that players pass over a part of one: it is marked as free space until
all of it is on the disk.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from fractions import Fraction
import io
import json
import os
import pathlib
import struct

import av
from av.video.frame import PictureType
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.files import explained
from hiar_jax.video.frames import checked_frames
from hiar_jax.video.mp4 import yuv_frame

_MOVFLAGS = "frag_keyframe+empty_moov+default_base_moof"
_CONTAINERS = ("moov", "moof", "traf", "trak", "mdia", "minf", "stbl")
_FREE = b"free"  # the name of a box that players pass over, whole or not
_NO_LIMIT = 2**31 - 1  # frames between key frames: only a fragment's first frame is one


@dataclasses.dataclass(frozen=True)
class Fragment:
  """`frames` frames, the first of them number `first`, in bytes start .. end of the file.

  The file's head is a fragment of 0 frames.
  """

  first: int
  frames: int
  start: int
  end: int


class FragmentedMP4:
  """Writes frames uint8 [n, H, W, 3], a call a fragment, all of one size.

  metadata: as media.write_mp4's, in the head. scale, crf: as there. The file's first bytes are
  written with the first frames. `mime` is its type for a browser's MediaSource, known from then on.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    *,
    scale: int = 1,
    crf: int = 14,
    keep: int | None = None,
  ):
    """keep: goes on with the file that is there, after its first `keep` frames; what follows them
    is cut off.

    Raises UserError where a file is there already (without `keep`), or is none that can be gone on
    with, or none can be written.
    """
    self.path, self.fps, self.frames, self.mime = pathlib.Path(path), fps, 0, ""
    self._metadata, self._scale, self._crf = dict(metadata or {}), scale, crf
    self._rate = Fraction(fps).limit_denominator(1001)
    self._encoder: _Encoder | None = None
    self._fragments: list[Fragment] = []
    self._head = b""
    self._file: io.FileIO | None = None
    with explained(self.path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
    if keep is not None:
      self._go_back(keep)
    elif self.path.exists():
      raise _taken(self.path)

  def write(self, frames: np.ndarray) -> Fragment:
    """One fragment of these frames, which is on the disk when this returns."""
    frames = checked_frames(self.path, frames)
    if self._encoder is None:
      self._start(frames.shape[1:3])
    if frames.shape[1:3] != self._encoder.size:
      raise UserError(
        f"{self.path}: frames of {frames.shape[1:3]}, the first ones of {self._encoder.size}; "
        "expected one size"
      )
    content = self._encoder.fragment(frames, self.frames, len(self._fragments))
    start = self._append(content[:4] + _FREE + content[8:])
    self._commit(start + 4, content[4:8])
    fragment = Fragment(self.frames, len(frames), start, start + len(content))
    self._fragments.append(fragment)
    self.frames += len(frames)
    return fragment

  def close(self) -> None:
    """There is nothing left to write: the file has been whole since its last fragment."""
    if self._file:
      self._file.close()

  def __enter__(self) -> "FragmentedMP4":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def _start(self, size: tuple[int, int]) -> None:
    self._encoder = _Encoder(size, self._rate, self._scale, self._crf, self._metadata)
    self.mime = f'video/mp4; codecs="{codec_name(self._encoder.head)}"'
    if self._file is None:
      self._open("xb")
      self._append(self._encoder.head)
    elif _decoder_settings(self._head) != _decoder_settings(self._encoder.head):
      raise UserError(
        f"{self.path} is a video of another size or quality; give the one that this generation "
        "wrote, or start a new one"
      )

  def _open(self, mode: str) -> None:
    try:
      with explained(self.path):
        self._file = open(self.path, mode, buffering=0)
    except UserError as error:
      raise (
        _taken(self.path) if isinstance(error.__cause__, FileExistsError) else error
      ) from error.__cause__

  def _append(self, content: bytes) -> int:
    """Where it starts."""
    with explained(self.path):
      start, left = self._file.seek(0, os.SEEK_END), memoryview(content)
      while left:
        left = left[self._file.write(left) :]
      os.fsync(self._file.fileno())
    return start

  def _commit(self, at: int, name: bytes) -> None:
    """Gives a box its name."""
    with explained(self.path):
      os.pwrite(self._file.fileno(), name, at)
      os.fsync(self._file.fileno())

  def _go_back(self, keep: int) -> None:
    """To just after frame `keep`."""
    if not self.path.exists():
      raise UserError(
        f"{self.path} is not there to be gone on with; restore it, or start a new video"
      )
    head, *there = scan(self.path)
    kept = [fragment for fragment in there if fragment.first + fragment.frames <= keep]
    if sum(fragment.frames for fragment in kept) != keep:
      held = sum(fragment.frames for fragment in there)
      raise UserError(
        f"{self.path} holds {held} frames in fragments of other lengths; expected the first "
        f"{keep} to be whole"
      )
    end = kept[-1].end if kept else head.end
    self._open("r+b")
    self._head = os.pread(self._file.fileno(), head.end, 0)
    self._fragments, self.frames = kept, keep
    self._file.truncate(end)
    os.fsync(self._file.fileno())


class _Encoder:
  """Frames -> fragments. head: the bytes before the first one."""

  def __init__(
    self, size: tuple[int, int], rate: Fraction, scale: int, crf: int, metadata: Mapping[str, str]
  ):
    self.size, self._scale, self._time = size, scale, 1 / rate
    self._height, self._width = (side * scale + side * scale % 2 for side in size)
    head = io.BytesIO()
    # It writes the head and encodes; what it encodes goes into other files, one a fragment.
    self._container = av.open(head, "w", format="mp4", options={"movflags": _MOVFLAGS})
    self._container.metadata["comment"] = json.dumps(
      dict(metadata), ensure_ascii=False, sort_keys=True
    )
    # zerolatency: each frame comes out when it goes in; one thread: the same bytes on every machine
    self._stream = self._container.add_stream(
      "libx264", rate=rate, options={"crf": str(crf), "tune": "zerolatency", "threads": "1"}
    )
    self._stream.width, self._stream.height, self._stream.pix_fmt = (
      self._width,
      self._height,
      "yuv420p",
    )
    context = self._stream.codec_context
    context.gop_size, context.max_b_frames = _NO_LIMIT, 0
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
    self._container.start_encoding()
    self.head = head.getvalue()

  def fragment(self, frames: np.ndarray, first: int, index: int) -> bytes:
    """frames uint8 [n, H, W, 3], the first of them number `first`, as fragment `index`: a moof and
    an mdat box.
    """
    packets = [
      packet for i, frame in enumerate(frames) for packet in self._encode(frame, first + i, i == 0)
    ]
    file = io.BytesIO()
    options = {"movflags": f"{_MOVFLAGS}+skip_trailer", "fragment_index": str(index + 1)}
    with av.open(file, "w", format="mp4", options=options) as container:
      stream = container.add_stream_from_template(self._stream)
      stream.time_base = self._time
      for packet in packets:
        packet.stream, packet.duration = stream, 1
        container.mux(packet)
    content = bytearray(file.getvalue())
    start = next(box.start for box in _boxes(content) if box.name == "moof")
    tick = _ticks(content)
    decode_time = next(box for box in _boxes(content, deep=True) if box.name == "tfdt")
    struct.pack_into(">Q", content, decode_time.start + 12, round(first * self._time * tick))
    return bytes(content[start:])

  def _encode(self, frame: np.ndarray, number: int, key: bool) -> list[av.Packet]:
    picture = yuv_frame(frame, self._height, self._width, self._scale)
    picture.pts, picture.time_base = number, self._time
    picture.pict_type = PictureType.I if key else PictureType.NONE
    return self._stream.encode(picture)


def _taken(path: pathlib.Path) -> UserError:
  return UserError(f"{path} is there already; give another name, or remove it")


# -------------------------------------------------------------------------------------------- boxes


@dataclasses.dataclass(frozen=True)
class _Box:
  name: str
  start: int
  end: int


def scan(path: str | os.PathLike) -> list[Fragment]:
  """The head and the whole fragments of a file, in order; a cut-off one at its end is left out.

  Raises UserError where this is no fragmented MP4.
  """
  with explained(pathlib.Path(path)):
    content = pathlib.Path(path).read_bytes()
  found, head, moof, frames = [], 0, None, 0
  for box in _boxes(content):
    if box.name == "moov":
      head = box.end
      found.append(Fragment(0, 0, 0, head))
    elif box.name == "moof":
      moof = box
    elif box.name == "mdat" and moof and found:
      count = _samples(content, moof)
      found.append(Fragment(frames, count, moof.start, box.end))
      frames, moof = frames + count, None
  if not head:
    raise UserError(
      f"{path} is no fragmented MP4 (it has no head); give a video that a stream wrote"
    )
  return found


def codec_name(head: bytes) -> str:
  """What a browser calls the codec (RFC 6381), such as avc1.64001f: profile, constraints and
  level.
  """
  return f"avc1.{_decoder_settings(head)[1:4].hex()}"


def _decoder_settings(head: bytes) -> bytes:
  """The content of the avcC box."""
  at = head.index(b"avcC")
  return head[at + 4 : at - 4 + int.from_bytes(head[at - 4 : at])]


def _samples(content: bytes, moof: _Box) -> int:
  runs = [box for box in _boxes(content, moof.start + 8, moof.end, deep=True) if box.name == "trun"]
  return sum(struct.unpack_from(">I", content, run.start + 12)[0] for run in runs)


def _ticks(content: bytes) -> int:
  """Units of the track's clock in a second."""
  box = next(box for box in _boxes(content, deep=True) if box.name == "mdhd")
  return struct.unpack_from(">I", content, box.start + (28 if content[box.start + 8] else 20))[0]


def _boxes(
  content: bytes, start: int = 0, end: int | None = None, deep: bool = False
) -> Iterator[_Box]:
  """The whole boxes between two offsets; deep: also those inside."""
  end = len(content) if end is None else end
  while start + 8 <= end:
    size, name = struct.unpack_from(">I4s", content, start)
    if size < 8 or start + size > end:
      return
    box = _Box(name.decode("latin-1"), start, start + size)
    yield box
    if deep and box.name in _CONTAINERS:
      yield from _boxes(content, start + 8, box.end, deep=True)
    start = box.end
