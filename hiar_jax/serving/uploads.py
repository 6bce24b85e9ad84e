"""Uploads: a picture or a video that a client sends to start from. It is untrusted: checked and
bounded before it is decoded, and on disk only meanwhile, in a directory of its own.
"""

import math
import pathlib
import tempfile
import warnings

import av
from PIL import Image, UnidentifiedImageError

from hiar_jax.errors import UserError
from hiar_jax.streaming.streaming_model import ConditioningFrames, StreamingModel
from hiar_jax.video import conditioning_files

# First bytes of the formats that are accepted. Not by what Pillow and FFmpeg can open: FFmpeg also
# reads playlists, which name other files and addresses, and Pillow starts Ghostscript for EPS.
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # PNG, JPEG, GIF, WebP
MATROSKA = b"\x1a\x45\xdf\xa3"  # the EBML header of MKV and WebM
MAX_PIXELS = 64 * 2**20  # of a picture
MAX_FRAMES = 3600  # of a video
MAX_SECONDS = 120.0  # of a video
MAX_VIDEO = 2**32  # pixels of all frames of a video
MAX_NAME = 80  # characters
TAKEN = "give a picture (PNG, JPEG, WebP, GIF) or a video (MP4, MOV, WebM, MKV)"


def read(source: StreamingModel, name: str, content: bytes) -> tuple[ConditioningFrames, str]:
  """Returns (conditioning frames, message about their resizing or cropping, or '').

  Raises UserError that calls the file by its `name`.
  """
  # the last part of a path of either system; it goes into messages and metadata, never into a path
  name = pathlib.PurePath(name.replace("\\", "/")).name[-MAX_NAME:] or "the start"
  # bytes 8-12: RIFF is the container of WebP, but of AVI and WAV too; 4-8: MP4 and MOV
  if conditioning_files.is_heic(content):
    raise UserError(f"{name} is a HEIC picture, which is not read here; save it as JPEG")
  if content.startswith(PICTURES) and (content[:4] != b"RIFF" or content[8:12] == b"WEBP"):
    kind, check = "image", check_picture
  elif content.startswith(MATROSKA) or content[4:8] == b"ftyp":
    kind, check = "video", check_video
  else:
    raise UserError(f"{name} is neither a picture nor a video that can be read here; {TAKEN}")
  with tempfile.TemporaryDirectory(prefix="hiar_jax_start_") as directory:
    path = pathlib.Path(directory) / "start"
    path.write_bytes(content)
    try:
      check(name, path)
      frames, message = source.read_start(path, kind, name)
    except UserError as error:
      raise UserError(str(error).replace(str(path), name)) from error
  if message.startswith(path.name):  # the temporary file's name means nothing to the viewer
    message = message.replace(path.name, name, 1)
  return frames, message


def check_picture(name: str, path: pathlib.Path) -> None:
  """Raises UserError for a picture with more than MAX_PIXELS, or that cannot be read."""
  try:
    # only the header is read here; Pillow's own limit warns at 89 million pixels, above ours
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


def check_video(name: str, path: pathlib.Path) -> None:
  """Raises UserError for a video with more than MAX_FRAMES, MAX_SECONDS or MAX_VIDEO pixels, or
  that cannot be read.

  Counts packets without decoding them: the header's length and frame count may be false.
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
          start = float(packet.pts * packet.time_base)
          end = start + float((packet.duration or 0) * packet.time_base)
          first, last = min(first, start), max(last, end)  # packets come in decoding order
        if i > frames or last - first > MAX_SECONDS:  # > : the last packet is empty, a flush
          raise UserError(
            f"{name} is too long: of its size {frames} frames are read, {MAX_SECONDS:g} seconds "
            "at most; cut it first"
          )
  except av.error.FFmpegError as error:
    raise UserError(f"{name} is a damaged video, or none; {TAKEN}") from error
