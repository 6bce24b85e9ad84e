"""Clips of a video file: decoded in order, resampled in time by timestamps, resized and cropped."""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import os

import av
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.video.foreign_files import Unusable, open_video
from hiar_jax.video.frame_pixels import Look

# A file that decodes to less than this share of its declared frames counts as cut off; containers
# declare a few frames more or less than there are.
_TRUNCATED = 0.9
# Seconds between two timestamps may be off by this: Matroska rounds to milliseconds.
_ROUNDING = 1.1e-3
# FFmpeg's own decoders, which it prefers, pass over the alpha channel of WebM.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Pixels of a frame. A header may say 64x64 of frames that are 12000x12000; 8K has half of it.
MAX_FRAME_PIXELS = 64 * 2**20


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

  @property
  def size(self) -> tuple[int, int]:
    return self.height, self.width


def survey(path: str | os.PathLike, sampling: Sampling) -> tuple[np.ndarray, list[str]]:
  """Decodes the whole file: (which of its resampled frames differ from the one before, bool [N];
  how its pixels are changed, in words).

  Raises:
    Unusable: damaged, cut off, without a picture, or too short for one clip.
    av.error.FFmpegError: not a video, or its data cannot be decoded.
  """
  moves: list[bool] = []
  before = None
  with open_video(path) as container:
    film = Film(container)
    for image, repeats in film.images(sampling):
      if repeats:
        moves += [before is not None and _differ(before, image)] + [False] * (repeats - 1)
        before = image
  if len(moves) < sampling.frames:
    raise Unusable(
      f"too short: {len(moves)} frames at {sampling.fps:g} frames a second, a clip needs "
      f"{sampling.frames}"
    )
  return np.asarray(moves), film.look.changes


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether more than rounding is between two images uint8 [H W 3]."""
  return bool((np.maximum(a, b) - np.minimum(a, b)).max() > 1)


def starts(moves: np.ndarray, frames: int, stride: int) -> tuple[np.ndarray, int]:
  """Returns (first frames of a film's windows of `frames` frames, one every `stride`; how many were
  left out). moves: of `survey`.

  Of windows in which nothing moves, those that show what the one before them shows are left out: a
  recording that stands still for an hour is one clip of it, not thousands.
  """
  first = np.arange(0, len(moves) - frames + 1, stride)
  changes = np.concatenate([[0], np.cumsum(moves)])  # changes[i]: of the frames before i
  as_before = changes[first + frames] == np.roll(changes[first + 1], 1)
  as_before[0] = False
  return first[~as_before], int(as_before.sum())


def spans(
  path: str | os.PathLike, sampling: Sampling, wanted: Iterable[tuple[int, int]]
) -> Iterator[np.ndarray]:
  """Yields frames of a file, uint8 [n H W 3], for each (first, n) of `wanted` that lies in it, in
  one pass. They begin and end in their order. Raises what `survey` raises, but for short files.
  """
  wanted = iter(wanted)
  span = next(wanted, None)
  kept: collections.deque[np.ndarray] = collections.deque()
  index = 0  # of the frame behind those that are kept
  with open_video(path) as container:
    film = Film(container)
    for image, repeats in film.images(sampling):
      for _ in range(repeats):
        kept.append(image)
        index += 1
        while span is not None and index == sum(span):
          yield np.stack(list(kept)[-span[1] :])
          span = next(wanted, None)
        while kept and (span is None or index - len(kept) < span[0]):
          kept.popleft()
      if span is None:
        return


class Film:
  """The first video stream of an open container, from its beginning; `look`: its pixels.

  Raises Unusable where there is none.
  """

  def __init__(self, container: av.container.InputContainer):
    if not container.streams.video:
      raise Unusable("no video stream")
    self._container = container
    self._stream = container.streams.video[0]
    self._stream.thread_type = "AUTO"  # FFmpeg decodes on all cores
    self.look = Look(self._stream.sample_aspect_ratio)

  @property
  def rate(self) -> float:
    """The frames per second that it declares; 25 without any, as FFmpeg's default."""
    return float(self._stream.average_rate or self._stream.guessed_rate or 25)

  def images(self, sampling: Sampling) -> Iterator[tuple[np.ndarray | None, int]]:
    """Yields (image uint8 [H W 3], repeats) as `resampled`; None for a frame that it skips, which
    is decoded, but not resized.
    """
    for frame, repeats in self.resampled(sampling.fps):
      image = self.look.cover(frame, sampling.height, sampling.width) if repeats else None
      yield image, repeats

  def resampled(self, fps: float) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yields (frame, repeats): how many of the times 0, 1/fps, 2/fps, ... show this frame.

    Times count from the first frame. A frame is shown until the next one, the last for its
    duration. Raises what `survey` raises, but for a file too short for one clip.
    """
    previous = None
    done = 0  # ticks that the frames so far fill
    times: list[float] = []
    for frame in self._progressive():
      time = len(times) / self.rate if frame.time is None else float(frame.time)
      if previous is not None:
        due = _ticks(time - times[0], fps)
        # max: timestamps of damaged files may go back
        yield previous, max(0, due - done)
        done = max(done, due)
      previous = frame
      times.append(time)
    end = max(times) + self._last_duration(previous, times)
    yield previous, max(0, _ticks(end - times[0], fps) - done)

  def _last_duration(self, last: av.VideoFrame, times: list[float]) -> float:
    """How long the last frame is shown, in seconds: as it says, within what is known else."""
    stream, duration = self._stream, 1 / self.rate
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

  def _progressive(self) -> Iterator[av.VideoFrame]:
    """Yields the frames, the interlaced ones with lines that belong to one time."""
    graph = None
    for frame in self._decoded():
      if frame.interlaced_frame and graph is None:
        self.look.say("deinterlaced")
        graph = _deinterlacer(self._stream)
      if graph is None:
        yield frame
      else:
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
      graph.push(None)
      yield from _pulled(graph)

  def _decoded(self) -> Iterator[av.VideoFrame]:
    """Yields every shown frame.

    Raises:
      Unusable: no picture, damaged or huge ones, or fewer frames than the container declares.
    """
    count = hidden = 0
    decode = self._decoder()
    for packet in self._container.demux(self._stream):
      # An edit list hides it, as where a film was trimmed without being encoded anew. The decoder
      # needs it for the frames that are shown, and keeps its own frame to itself.
      hidden += packet.is_discard
      for frame in decode(packet):
        if frame.is_corrupt:
          raise Unusable(f"damaged at frame {count}")
        if frame.width * frame.height > MAX_FRAME_PIXELS:
          raise Unusable(
            f"frame {count} has {frame.width} x {frame.height} pixels, at most "
            f"{MAX_FRAME_PIXELS // 2**20} million are read"
          )
        yield frame
        count += 1
    if not count:
      raise Unusable("no picture in it")
    # stream.frames is 0 where the container declares no count
    declared = self._stream.frames - hidden
    if count < _TRUNCATED * declared:
      raise Unusable(f"cut off: {count} of {declared} frames there")

  def _decoder(self) -> Callable[[av.Packet], list[av.VideoFrame]]:
    """The function from a packet, at the end an empty one, to frames."""
    codec = _WITH_ALPHA.get(self._stream.codec_context.name)
    if codec is None or self._stream.metadata.get("alpha_mode") != "1":
      return lambda packet: packet.decode()
    context = av.CodecContext.create(codec, "r")
    return lambda packet: context.decode(packet if packet.size else None)


def _deinterlacer(stream: av.VideoStream) -> av.filter.Graph:
  """FFmpeg's bwdif on the frames that are interlaced; each gives one frame."""
  graph = av.filter.Graph()
  source = graph.add_buffer(template=stream, time_base=stream.time_base)
  bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
  graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
  return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
  """Yields the frames that a graph has ready."""
  while True:
    try:
      yield graph.pull()
    except (av.error.BlockingIOError, av.error.EOFError):  # it waits for more, or is at the end
      return


def _ticks(seconds: float, fps: float) -> int:
  """The number of the times 0, 1/fps, 2/fps, ... before `seconds`."""
  return int(np.ceil((seconds - _ROUNDING) * fps))
