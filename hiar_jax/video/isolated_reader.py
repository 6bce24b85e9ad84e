"""Reads untrusted pictures and videos in a process of its own: a file can take its time and its
memory, or crash it, but not those of the server.

The process imports no JAX and starts in a third of a second. It gets a JSON object on stdin, and
answers with one line of JSON and the raw frames on stdout.
"""

import dataclasses
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import threading
from typing import Any
import warnings

import av
import numpy as np
from PIL import Image

from hiar_jax.errors import UserError
from hiar_jax.video import conditioning_files, foreign_files

TAKEN = "give a picture (PNG, JPEG, WebP, GIF) or a video (MP4, MOV, WebM, MKV)"


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a file may take."""

  seconds: float = 20.0  # to be read in
  memory: int = 3 * 2**30  # bytes of address space
  pixels: int = 64 * 2**20  # of a picture
  frames: int = 3600  # of a video
  video_seconds: float = 120.0  # of a video
  video_pixels: int = 2**32  # of all frames of a video


class IsolatedReader:
  """Reads as `conditioning_files`, in processes that `close` ends. For any number of threads."""

  def __init__(self, limits: Limits = Limits()):
    self.limits = limits
    self._lock = threading.Lock()  # guards what follows
    self._running: set[subprocess.Popen] = set()
    self._is_closed = False

  def read_image(self, path: pathlib.Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """As conditioning_files.read_image. Raises UserError, for a file beyond the limits too."""
    return self._read("image", path, height, width)

  def read_video(
    self, path: pathlib.Path, height: int, width: int, fps: float, last: int | None = None
  ) -> tuple[np.ndarray, str]:
    """As conditioning_files.read_video. Raises UserError, for a file beyond the limits too."""
    return self._read("video", path, height, width, fps, last)

  def close(self) -> None:
    """Ends what is being read, which raises UserError there, and reads nothing from now on."""
    with self._lock:
      self._is_closed = True
      for process in self._running:
        process.kill()

  def _read(self, kind: str, path: pathlib.Path, *arguments) -> tuple[np.ndarray, str]:
    order = {
      "kind": kind,
      "path": str(path),
      "arguments": arguments,
      "limits": dataclasses.asdict(self.limits),
    }
    process = self._start(path)
    try:
      output, _ = process.communicate(json.dumps(order).encode(), timeout=self.limits.seconds)
    except subprocess.TimeoutExpired:
      raise UserError(
        f"{path} takes more than {self.limits.seconds:g} seconds to read; scale it down or cut it "
        "first"
      ) from None
    finally:
      process.kill()
      process.communicate()  # closes its pipes, and waits for its end
      with self._lock:
        self._running.discard(process)
    if self._is_closed:
      raise UserError(f"{path} was not read: the server stops")
    head, _, content = output.partition(b"\n")
    if process.returncode or not head:
      raise UserError(f"{path} is damaged, or takes too much time or memory to read; {TAKEN}")
    answer = json.loads(head)
    if "error" in answer:
      raise UserError(answer["error"])
    return np.frombuffer(content, np.uint8).reshape(answer["shape"]).copy(), answer["message"]

  def _start(self, path: pathlib.Path) -> subprocess.Popen:
    package = str(pathlib.Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # arenas and BLAS threads reserve address space, which is limited
    few = {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **few, "PYTHONPATH": os.pathsep.join(paths)}
    with self._lock:
      if self._is_closed:
        raise UserError(f"{path} was not read: the server stops")
      process = subprocess.Popen(
        [sys.executable, "-m", "hiar_jax.video.isolated_reader"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # FFmpeg's own words on damaged files
        env=environment,
      )
      self._running.add(process)
    return process


# ------------------------------------------------------------------------------ inside the process


def main() -> None:
  """Carries out one order."""
  order = json.load(sys.stdin)
  limits = Limits(**order["limits"])
  _limit(limits)
  try:
    pixels, message = _checked_read(
      order["kind"], pathlib.Path(order["path"]), order["arguments"], limits
    )
    answer = {"shape": pixels.shape, "message": message}
  except UserError as error:
    pixels, answer = np.zeros(0, np.uint8), {"error": " ".join(str(error).split())}
  sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + pixels.tobytes())
  sys.stdout.buffer.flush()


def _limit(limits: Limits) -> None:
  """Limits this process, for good."""
  # the time of all cores: it ends too where the server, which would end it, was killed
  seconds = math.ceil(limits.seconds * (os.cpu_count() or 1))
  wanted = {
    resource.RLIMIT_AS: limits.memory,
    resource.RLIMIT_CPU: seconds,
    resource.RLIMIT_CORE: 0,
  }
  for what, most in wanted.items():
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
      most = min(most, hard)
    resource.setrlimit(what, (most, most))


def _checked_read(
  kind: str, path: pathlib.Path, arguments: list[Any], limits: Limits
) -> tuple[np.ndarray, str]:
  try:
    if kind == "image":
      _check_picture(path, limits)
      return conditioning_files.read_image(path, *arguments, formats=foreign_files.PAGE_PICTURES)
    _check_video(path, limits)
    return conditioning_files.read_video(path, *arguments, formats=foreign_files.PAGE_VIDEOS)
  except (foreign_files.Unusable, av.error.FFmpegError) as error:
    raise UserError(f"{path} is a damaged video, or none; {TAKEN}") from error


def _check_picture(path: pathlib.Path, limits: Limits) -> None:
  """Raises UserError for a picture with more pixels than the limit, or that cannot be read."""
  try:
    # only the header is read here; Pillow's own limit warns at 89 million pixels, above ours
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with foreign_files.open_picture(path, foreign_files.PAGE_PICTURES) as image:
        width, height = image.size
  except (
    Image.UnidentifiedImageError,
    Image.DecompressionBombError,
    foreign_files.Unusable,
  ) as error:
    raise UserError(f"{path} is a damaged picture, or none; {TAKEN}") from error
  if width * height > limits.pixels:
    raise UserError(
      f"{path} has {width} x {height} pixels, at most {limits.pixels // 2**20} million are read; "
      "scale it down first"
    )


def _check_video(path: pathlib.Path, limits: Limits) -> None:
  """Raises UserError for a video beyond the limits, Unusable or FFmpegError for a damaged one.

  Counts packets without decoding them: the header's length and frame count may be false.
  """
  with foreign_files.open_video(path, foreign_files.PAGE_VIDEOS) as container:
    if not container.streams.video:
      raise UserError(f"{path} has no video in it; {TAKEN}")
    stream = container.streams.video[0]
    frames = min(limits.frames, limits.video_pixels // max(1, stream.width * stream.height))
    first, last = math.inf, -math.inf
    for i, packet in enumerate(container.demux(stream)):
      if packet.pts is not None:
        start = float(packet.pts * packet.time_base)
        end = start + float((packet.duration or 0) * packet.time_base)
        first, last = min(first, start), max(last, end)  # packets come in decoding order
      # > : the last packet is empty, a flush
      if i > frames or last - first > limits.video_seconds:
        raise UserError(
          f"{path} is too long: of its size {frames} frames are read, {limits.video_seconds:g} "
          "seconds at most; cut it first"
        )


if __name__ == "__main__":
  main()
