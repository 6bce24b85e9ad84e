"""Uploads: a picture or a video that a client sends to start from. It is untrusted: read in a
process of its own, and on disk only meanwhile, in a directory of its own.
"""

import pathlib
import tempfile

from hiar_jax.errors import UserError
from hiar_jax.streaming.streaming_model import ConditioningFrames, StreamingModel
from hiar_jax.video import conditioning_files, foreign_files
from hiar_jax.video.isolated_reader import TAKEN, IsolatedReader

# First bytes of the formats that are accepted. Not by what Pillow and FFmpeg can open: FFmpeg also
# reads playlists, which name other files and addresses, and Pillow starts Ghostscript for EPS.
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # PNG, JPEG, GIF, WebP
MATROSKA = b"\x1a\x45\xdf\xa3"  # the EBML header of MKV and WebM
MAX_NAME = 80  # characters


def read(
  source: StreamingModel, reader: IsolatedReader, name: str, content: bytes
) -> tuple[ConditioningFrames, str]:
  """Returns (conditioning frames, message about their resizing or cropping, or '').

  Raises UserError that calls the file by its `name`.
  """
  # the last part of a path of either system; it goes into messages and metadata, never into a path
  name = pathlib.PurePath(name.replace("\\", "/")).name[-MAX_NAME:] or "the start"
  # bytes 8-12: RIFF is the container of WebP, but of AVI and WAV too; 4-8: MP4 and MOV
  if conditioning_files.is_heic(content):
    raise UserError(f"{name} is a HEIC picture, which is not read here; save it as JPEG")
  if content.startswith(PICTURES) and (content[:4] != b"RIFF" or content[8:12] == b"WEBP"):
    kind = "image"
  elif content.startswith(MATROSKA) or content[4:8] == b"ftyp":
    kind = "video"
  else:
    raise UserError(f"{name} is neither a picture nor a video that can be read here; {TAKEN}")
  path = None
  try:
    with (
      foreign_files.boundary(),
      tempfile.TemporaryDirectory(prefix="hiar_jax_start_") as directory,
    ):
      path = pathlib.Path(directory) / "start"
      path.write_bytes(content)
      frames, message = source.read_start(path, kind, name, reader)
  except UserError as error:
    raise UserError(str(error).replace(str(path), name)) from error
  except foreign_files.Unusable as error:
    raise UserError(f"{name} cannot be read ({error}); {TAKEN}".replace(str(path), name)) from error
  if message.startswith(path.name):  # the temporary file's name means nothing to the viewer
    message = message.replace(path.name, name, 1)
  return frames, message
