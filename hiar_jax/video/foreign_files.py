"""The one boundary through which pictures and videos of others are opened.

Only known formats are: FFmpeg also reads playlists, which name other files and addresses, and
Pillow starts Ghostscript for EPS. Whatever its decoders raise is `Unusable`, with a reason.
"""

from collections.abc import Iterator
import contextlib
import errno
import os

import av
from PIL import Image

from hiar_jax.errors import UserError

# Names of FFmpeg's demuxers and of Pillow's formats.
VIDEOS = (
  *("mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "gif", "apng", "asf", "flv", "ogg"),
  *("h264", "hevc", "m4v", "yuv4mpegpipe", "ivf", "mxf", "dv", "nut", "rm"),
)
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
# Those of a page: what browsers show.
PAGE_VIDEOS = ("mov", "matroska")
PAGE_PICTURES = ("PNG", "JPEG", "WEBP", "GIF")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Unusable(Exception):
  """The file gives no picture or clip; the message says why."""


@contextlib.contextmanager
def boundary() -> Iterator[None]:
  """Raises Unusable for whatever is raised inside of it.

  Errors that say what a file is not pass: UserError, and those of FFmpeg and Pillow.
  """
  try:
    yield
  except (UserError, Unusable, av.error.FFmpegError):
    raise
  except (Image.UnidentifiedImageError, Image.DecompressionBombError):
    raise
  except MemoryError as error:
    raise Unusable("it takes more memory than there is") from error
  except OSError as error:
    if error.errno in _NO_SPACE:
      raise Unusable("the disk for temporary files is full") from error
    raise Unusable(reason(error)) from error
  except Exception as error:  # decoders raise whatever a damaged file leads them to
    raise Unusable(f"damaged: {reason(error)}") from error


def reason(error: BaseException) -> str:
  """One short line on an error."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def open_video(
  path: str | os.PathLike, formats: tuple[str, ...] = VIDEOS
) -> Iterator[av.container.InputContainer]:
  """Opens a video for reading; what is raised while it is open passes the `boundary`.

  Raises:
    Unusable: none of `formats`, or anything else that is wrong with it.
    av.error.FFmpegError: not a video, or its data cannot be decoded.
  """
  # the protocol: a name like http://x is no address
  options = {"format_whitelist": ",".join(formats), "protocol_whitelist": "file"}
  with boundary():
    try:
      # tags are in Latin-1 and others too, but are never decoded strictly
      container = av.open(os.fspath(path), options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:
      raise Unusable("of a format that is not read here") from error
    with container:
      yield container


@contextlib.contextmanager
def open_picture(
  path: str | os.PathLike, formats: tuple[str, ...] = PICTURES
) -> Iterator[Image.Image]:
  """Opens a picture of one of `formats` for reading, its pixels not yet decoded.

  What is raised while it is open passes the `boundary`, as Unusable, but for Pillow's
  UnidentifiedImageError (none of `formats`) and DecompressionBombError.
  """
  with boundary(), Image.open(path, formats=formats) as image:
    yield image
