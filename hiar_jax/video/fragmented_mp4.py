"""Fragmented MP4 (ISO/IEC 14496-12, 8.8): H.264 video that can be played while it is written.

    file = head (ftyp moov), fragment, fragment, ...     fragment = moof mdat

Each fragment is complete and on the disk before the next one starts, so a killed process leaves a
file that plays up to its last whole fragment and that can be resumed. FFmpeg writes every box; what
is done here:

- A fragment leaves the muxer with its last frame; FFmpeg would keep it until the next one begins.
- Its decode time is patched, since a muxer of its own starts every fragment at 0.
- It is written under the name `free`, a box that players skip, and named `moof` when all of it is
  on the disk.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
from fractions import Fraction
import io
import os
import pathlib
import struct

import av
from av.video.frame import PictureType
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.files import DiskFull, reading, writing
from hiar_jax.video import mp4_boxes
from hiar_jax.video.frames import checked_frames
from hiar_jax.video.mp4 import BT709, SITING, comment, yuv_frame

_MOVFLAGS = "frag_keyframe+empty_moov+default_base_moof"
_NO_LIMIT = 2**31 - 1  # frames between key frames: only the first frame of a fragment is one
_KEPT = "the video is whole up to its last fragment"
_TAKEN = "{} is there already; give another name, or remove it"


@dataclasses.dataclass(frozen=True)
class Fragment:
  """Frames first .. first + frames of the video, bytes start .. end of the file; ends are excluded.

  The head of the file is a fragment of 0 frames.
  """

  first: int
  frames: int
  start: int
  end: int


class FragmentedMP4(contextlib.AbstractContextManager):
  """A writer of frames uint8 [n H W 3], all of one size: one fragment per call of `write`.

  The file appears with the first frames. From then on `mime` is its type for MediaSource of a
  browser. metadata, scale, crf: as in `mp4.write_mp4`; the metadata is in the head.
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
    """Opens a new file, or resumes one.

    keep: resumes the existing file after its first `keep` frames and cuts off later ones.

    Raises UserError where the file exists (without `keep`), cannot be resumed, or cannot be
    written.
    """
    self.path = pathlib.Path(path)
    self.fps = fps
    self.frames = 0
    self.mime = ""
    self._metadata = dict(metadata or {})
    self._scale = scale
    self._crf = crf
    self._rate = Fraction(fps).limit_denominator(1001)
    # the encoder needs the frames' size, so it starts with the first ones
    self._encoder: _Encoder | None = None
    self._fragments: list[Fragment] = []
    self._head = b""
    self._file: io.FileIO | None = None
    with writing(self.path):
      self.path.parent.mkdir(parents=True, exist_ok=True)
    if keep is not None:
      self._truncate(keep)
    elif self.path.exists():
      raise UserError(_TAKEN.format(self.path))

  def write(self, frames: np.ndarray) -> Fragment:
    """Writes frames uint8 [n H W 3] as one fragment, which is on the disk when this returns."""
    frames = checked_frames(self.path, frames)
    if self._encoder is None:
      self._start(frames.shape[1:3])
    if frames.shape[1:3] != self._encoder.size:
      raise UserError(
        f"{self.path}: frames of {frames.shape[1:3]}, the first ones of {self._encoder.size}; "
        "expected one size"
      )
    content = self._encoder.fragment(frames, self.frames, len(self._fragments))
    # Bytes 4 .. 8 are the name of the moof box. With the name `free` the box is skipped; an mdat
    # box without a moof before it is not played. The 4 bytes of the name are written last, after
    # all others were synchronised, and make the fragment valid in one step.
    start = self._append(content[:4] + mp4_boxes.FREE + content[8:])
    with writing(self.path, kept=_KEPT):
      os.pwrite(self._file.fileno(), content[4:8], start + 4)
      os.fsync(self._file.fileno())
    fragment = Fragment(self.frames, len(frames), start, start + len(content))
    self._fragments.append(fragment)
    self.frames += len(frames)
    return fragment

  def __exit__(self, kind, error, trace) -> None:
    """Closes the file, which is complete since its last fragment, with its length and an index:
    players then show how long it is, and find a moment without reading all of it.
    """
    if self._file:
      with self._file:
        if self._fragments and not isinstance(error, DiskFull):
          self._append(self._index())
          self._tell(self.frames / self._rate)

  def _index(self) -> bytes:
    units = mp4_boxes.timescale(self._head, "mdhd")
    times = [round(fragment.first / self._rate * units) for fragment in self._fragments]
    return mp4_boxes.index(times, [fragment.start for fragment in self._fragments])

  def _tell(self, seconds: float) -> None:
    """Writes the duration into the head; 0: it is not known."""
    at = mp4_boxes.room(self._head)
    if at is not None:  # files of before 2026-12 have no room for it
      box = mp4_boxes.duration(seconds, self._head)
      with writing(self.path, kept=_KEPT):
        os.pwrite(self._file.fileno(), box[8:], at + 8)
        os.pwrite(self._file.fileno(), box[:8], at)
        os.fsync(self._file.fileno())

  def _start(self, size: tuple[int, int]) -> None:
    """Starts the encoder for frames of (height, width), and writes the head of a new file."""
    told = size, self._rate, self._scale, self._crf, self._metadata
    self._encoder = _Encoder(*told)
    if self._file and _decoder_settings(self._head) != _decoder_settings(self._encoder.head):
      self._encoder = _Encoder(*told, siting={})  # files of before 2026-12 do not tell it
    settings = _decoder_settings(self._encoder.head)
    # the codec's name for browsers (RFC 6381): avc1 with profile, constraints and level
    self.mime = f'video/mp4; codecs="avc1.{settings[1:4].hex()}"'
    if self._file is None:
      with writing(self.path):
        try:
          # unbuffered: what is written is with the kernel, in the order of the calls
          self._file = open(self.path, "xb", buffering=0)
        except FileExistsError as error:
          raise UserError(_TAKEN.format(self.path)) from error
      self._head = self._encoder.head
      self._append(self._head)
    # a resumed file keeps its head, so new fragments must decode with its settings
    elif _decoder_settings(self._head) != settings:
      raise UserError(
        f"{self.path} is a video of another size or quality; give the one that this generation "
        "wrote, or start a new one"
      )

  def _append(self, content: bytes) -> int:
    """Writes bytes at the end of the file and returns the offset of the first."""
    with writing(self.path, len(content), _KEPT):
      start = self._file.seek(0, os.SEEK_END)
      left = memoryview(content)
      while left:  # a raw file may write less than it is given
        left = left[self._file.write(left) :]
      os.fsync(self._file.fileno())
    return start

  def _truncate(self, keep: int) -> None:
    """Opens the existing file and cuts it off after its first `keep` frames."""
    if not self.path.exists():
      raise UserError(
        f"{self.path} is not there to be gone on with; restore it, or start a new video"
      )
    head, *fragments = scan(self.path)
    # fragments are the smallest unit that can be cut off
    kept = [fragment for fragment in fragments if fragment.first + fragment.frames <= keep]
    if sum(fragment.frames for fragment in kept) != keep:
      held = sum(fragment.frames for fragment in fragments)
      raise UserError(
        f"{self.path} holds {held} frames in fragments of other lengths; expected the first "
        f"{keep} to be whole"
      )
    end = kept[-1].end if kept else head.end
    self._fragments = kept
    self.frames = keep
    with writing(self.path, kept=_KEPT), contextlib.ExitStack() as undo:
      self._file = undo.enter_context(open(self.path, "r+b", buffering=0))
      self._head = os.pread(self._file.fileno(), head.end, 0)
      self._tell(0)
      self._file.truncate(end)
      os.fsync(self._file.fileno())
      undo.pop_all()  # it stays open for what is written


class _Encoder:
  """Frames -> the bytes of fragments; `head`: the bytes before the first one."""

  def __init__(
    self,
    size: tuple[int, int],
    rate: Fraction,
    scale: int,
    crf: int,
    metadata: Mapping[str, str],
    siting: Mapping[str, str] = SITING,
  ):
    self.size = size
    self._scale = scale
    self._time = 1 / rate  # seconds per frame
    # even sides, for yuv420p
    self._height, self._width = (side * scale + side * scale % 2 for side in size)
    head = io.BytesIO()
    # This container writes the head and owns the encoder. Its packets are muxed into other
    # containers, one a fragment.
    self._container = av.open(head, "w", format="mp4", options={"movflags": _MOVFLAGS})
    self._container.metadata["comment"] = comment(metadata)
    # zerolatency: a frame is encoded when it is given; one thread: equal bytes on every machine
    options = {"crf": str(crf), "tune": "zerolatency", "threads": "1", **siting}
    self._stream = self._container.add_stream("libx264", rate=rate, options=options)
    self._stream.width, self._stream.height = self._width, self._height
    self._stream.pix_fmt = "yuv420p"
    context = self._stream.codec_context
    context.gop_size, context.max_b_frames = _NO_LIMIT, 0
    context.colorspace = context.color_primaries = context.color_trc = BT709
    self._container.start_encoding()
    self.head = mp4_boxes.with_room(head.getvalue())

  def fragment(self, frames: np.ndarray, first: int, index: int) -> bytes:
    """Encodes frames uint8 [n H W 3] into a moof and an mdat box.

    first: number of the first frame in the video; index: of the fragment, from 0.
    """
    packets = []
    for i, frame in enumerate(frames):
      picture = yuv_frame(frame, self._height, self._width, self._scale)
      picture.pts, picture.time_base = first + i, self._time
      # a key frame first, so that a fragment decodes without the ones before it
      picture.pict_type = PictureType.I if i == 0 else PictureType.NONE
      packets += self._stream.encode(picture)
    file = io.BytesIO()
    # skip_trailer: no index of the fragments at the end; sequence numbers of fragments start at 1
    options = {"movflags": f"{_MOVFLAGS}+skip_trailer", "fragment_index": str(index + 1)}
    with av.open(file, "w", format="mp4", options=options) as container:
      stream = container.add_stream_from_template(self._stream)
      stream.time_base = self._time
      for packet in packets:
        packet.stream, packet.duration = stream, 1
        container.mux(packet)
    content = bytearray(file.getvalue())
    starts = mp4_boxes.first_starts(content)
    # tfdt (8.8.12) in version 1, which FFmpeg writes: version and flags, the decode time in 8 bytes
    decode_time = round(first * self._time * mp4_boxes.timescale(content, "mdhd"))
    struct.pack_into(">Q", content, starts["tfdt"] + mp4_boxes.HEADER + 4, decode_time)
    return bytes(content[starts["moof"] :])  # without this container's own head


# -------------------------------------------------------------------------------------------- boxes


def scan(path: str | os.PathLike) -> list[Fragment]:
  """Returns the head and the whole fragments of a file, in order; a cut-off last one is left out.

  Raises UserError where this is no fragmented MP4.
  """
  with writing(path):  # it is read to be gone on with
    content = pathlib.Path(path).read_bytes()
  with reading(path, "give a video that a stream wrote", (LookupError, ValueError, struct.error)):
    found = _fragments(content)
    if found:
      head = content[: found[0].end]
      # what goes on with it reads these
      mp4_boxes.room(head), mp4_boxes.duration(1, head), mp4_boxes.timescale(head, "mdhd")
      _decoder_settings(head)
  if not found:
    raise UserError(
      f"{path} is no fragmented MP4 (it has no head); give a video that a stream wrote"
    )
  return found


def _fragments(content: bytes) -> list[Fragment]:
  """Returns the head and the whole fragments of a file's content; [] for one without a head."""
  found = []
  moof = None  # (start, end) of the last one, until its mdat comes
  frames = 0
  for name, start, end in mp4_boxes.boxes(content):
    if name == "moov":
      found.append(Fragment(0, 0, 0, end))
    elif name == "moof":
      moof = start, end
    elif name == "mdat" and moof and found:
      inner = mp4_boxes.boxes(content, moof[0] + mp4_boxes.HEADER, moof[1], deep=True)
      # trun (8.8.8): version and flags, then the number of samples, which are frames
      runs = [start + mp4_boxes.HEADER + 4 for name, start, _ in inner if name == "trun"]
      count = sum(struct.unpack_from(">I", content, run)[0] for run in runs)
      found.append(Fragment(frames, count, moof[0], end))
      frames += count
      moof = None
  return found


def _decoder_settings(head: bytes) -> bytes:
  """The content of the avcC box (ISO/IEC 14496-15): profile, level, parameter sets."""
  # by its name: it lies within a sample entry of stsd, which is no plain container of boxes
  at = head.index(b"avcC")
  return head[at + 4 : at - 4 + int.from_bytes(head[at - 4 : at])]
