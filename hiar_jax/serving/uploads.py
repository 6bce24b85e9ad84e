"""A picture or a video that a client hands in to start from. It may come from anyone: it is bounded
and looked at before it is decoded, and on the disk for no longer than that takes, in a directory of
its own.
"""

import math
import pathlib
import tempfile
import warnings

import av
from PIL import Image, UnidentifiedImageError

from hiar_jax.errors import UserError
from hiar_jax.serving.session import StreamSource
from hiar_jax.streaming.streaming_model import ConditioningFrames

# How files begin that are taken. Lists of other files (playlists), which FFmpeg would open too, and
# formats that other programs would be started for (EPS) begin otherwise.
# PNG, JPEG, GIF, and a WebP's container
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF")
MATROSKA = b"\x1a\x45\xdf\xa3"
MAX_PIXELS = 64 * 2**20  # of a picture
# of a video; MAX_VIDEO: pixels of all its frames
MAX_FRAMES, MAX_SECONDS, MAX_VIDEO = 3600, 120.0, 2**32
MAX_NAME = 80  # characters
TAKEN = "give a picture (PNG, JPEG, WebP, GIF) or a video (MP4, MOV, WebM, MKV)"


def read(source: StreamSource, name: str, content: bytes) -> tuple[ConditioningFrames, str]:
  """(the frames, as the model takes them; what was done to them in a line).

  Raises UserError, which calls the file by its `name`.
  """
  name = pathlib.PurePath(name.replace("\\", "/")).name[-MAX_NAME:] or "the start"
  kind = kind_of(name, content)
  with tempfile.TemporaryDirectory(prefix="hiar_jax_start_") as directory:
    path = pathlib.Path(directory) / "start"
    path.write_bytes(content)
    try:
      (look_at_picture if kind == "image" else look_at_video)(name, path)
      frames, line = source.read_start(path, kind, name)
    except UserError as error:
      raise UserError(str(error).replace(str(path), name)) from error
  return frames, line.replace(path.name, name, 1) if line.startswith(path.name) else line


def kind_of(name: str, content: bytes) -> str:
  """ "image" or "video", by how it begins. Raises UserError for anything else."""
  if content.startswith(PICTURES) and (content[:4] != b"RIFF" or content[8:12] == b"WEBP"):
    return "image"
  if content.startswith(MATROSKA) or content[4:8] == b"ftyp":
    return "video"
  raise UserError(f"{name} is neither a picture nor a video that can be read here; {TAKEN}")


def look_at_picture(name: str, path: pathlib.Path) -> None:
  """Raises UserError for one that would be too large in memory, or is no picture after all."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(path) as image:
        width, height = image.size
  except (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
  ) as error:
    raise UserError(f"{name} is a damaged picture, or none; {TAKEN}") from error
  if width * height > MAX_PIXELS:
    raise UserError(
      f"{name} has {width} x {height} pixels, at most {MAX_PIXELS // 2**20} million are read; "
      "scale it down first"
    )


def look_at_video(name: str, path: pathlib.Path) -> None:
  """Raises UserError for one that would take too long to decode, by what its container says of
  every packet, or that is no video.
  """
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise UserError(f"{name} has no video in it; {TAKEN}")
      stream = container.streams.video[0]
      frames = min(MAX_FRAMES, MAX_VIDEO // max(1, stream.width * stream.height))
      first, last = math.inf, -math.inf
      for i, packet in enumerate(container.demux(stream)):
        if packet.pts is not None:
          time = float(packet.pts * packet.time_base)
          first, last = (
            min(first, time),
            max(last, time + float((packet.duration or 0) * packet.time_base)),
          )
        if i > frames or last - first > MAX_SECONDS:  # the last packet is empty
          raise UserError(
            f"{name} is too long: of its size {frames} frames are read, {MAX_SECONDS:g} seconds "
            "at most; cut it first"
          )
  except av.error.FFmpegError as error:
    raise UserError(f"{name} is a damaged video, or none; {TAKEN}") from error
