"""What a video starts from: an image or a video of any size as uint8 frames [F H W 3], scaled until
it covers the size and centre-cropped.

Every reader also returns one line that says what it did to the picture, empty where it did nothing.
"""

from collections import deque
from collections.abc import Iterator
import os
import pathlib
import warnings

import av
import numpy as np
from PIL import ExifTags, Image, ImageOps

from hiar_jax.errors import UserError
from hiar_jax.video import video_file

_FORMATS = "PNG, JPEG, WebP or another that Pillow reads"
_VIDEOS = "MP4, WebM or another that FFmpeg reads"
_SIXTEEN = 257  # 65535 / 255


def read_image(path: str | os.PathLike, height: int, width: int) -> tuple[np.ndarray, str]:
  """(uint8 [1 H W 3], what was done). Turned upright by its EXIF note; alpha over black; of an
  animation the first frame.

  Raises UserError where there is no such file, or it is no image, empty, cut off, or of a depth
  that has no known white.
  """
  path = _existing(path, "image")
  done = []
  try:
    with warnings.catch_warnings():
      # a large photograph; beyond twice that Pillow refuses
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(path) as stored:
        if getattr(stored, "n_frames", 1) > 1:
          done.append(f"the first of {stored.n_frames} frames")
        if stored.getexif().get(ExifTags.Base.Orientation, 1) != 1:
          done.append("turned upright by its EXIF note")
        image = ImageOps.exif_transpose(stored)
        image.load()
  except Image.UnidentifiedImageError as error:
    raise UserError(
      f"{path} is not an image; give a {_FORMATS} file (a video is given as --video)"
    ) from error
  except Image.DecompressionBombError as error:
    raise UserError(f"{path} has too many pixels ({error}); scale it down first") from error
  except (OSError, SyntaxError, ValueError, EOFError) as error:
    # what Pillow's decoders raise on damaged files
    raise UserError(f"{path} is a damaged or cut off image ({error}); save it again") from error
  picture = _cover(_to_rgb(image, path, done), height, width)
  return np.asarray(picture)[None], _said(path, image.size[::-1], (height, width), done)


def read_video(
  path: str | os.PathLike, height: int, width: int, fps: float, last: int | None = None
) -> tuple[np.ndarray, str]:
  """(uint8 [F H W 3], what was done): the frames on screen at 0, 1/fps, 2/fps, ..., or the last of
  them where `last` says how many.

  Upright, whatever the container's rotation says. Raises UserError where there is no such file, or
  it is no video, empty, damaged or cut off.
  """
  path = _existing(path, "video")
  every = video_file.Sampling(frames=1, height=height, width=width, fps=fps, stride=1)
  try:
    size, rate, rotation = _look(path)
    kept, total = deque(maxlen=last), 0
    for clip in video_file.clips(path, every):
      kept.append(clip[0])
      total += 1
  except av.error.InvalidDataError as error:
    raise UserError(
      f"{path} is not a video, or a damaged one; give a {_VIDEOS} file (a picture is given as "
      "--image)"
    ) from error
  except (video_file.Unusable, av.error.FFmpegError) as error:
    raise UserError(f"{path} cannot be used ({error}); give a {_VIDEOS} file") from error
  if not kept:
    raise UserError(f"{path} shows no frame at {fps:g} frames a second; give a longer video")
  done = ["turned upright by its container's note"] if rotation else []
  if abs(rate - fps) > 1e-3:
    done.append(f"resampled from {rate:g} to {fps:g} frames a second")
  if len(kept) < total:
    done.append(f"the last {len(kept)} of {total} frames")
  return np.stack(kept), _said(path, size, (height, width), done)


def _existing(path: str | os.PathLike, kind: str) -> pathlib.Path:
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(
      f"{kind} {path} {'is a directory' if path.is_dir() else 'does not exist'}; give the path of "
      "a file"
    )
  if not path.stat().st_size:
    raise UserError(f"{kind} {path} is empty; give another file, or save it again")
  return path


def _look(path: pathlib.Path) -> tuple[tuple[int, int], float, int]:
  """(height and width upright, frames a second, rotation in degrees) of a container's first video
  stream.
  """
  with av.open(str(path)) as container:
    if not container.streams.video:
      raise video_file.Unusable("no video stream")
    stream = container.streams.video[0]
    frame = next(container.decode(stream), None)
    if frame is None:
      raise video_file.Unusable("no picture in it")
    size = (frame.height, frame.width)
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    return size[::-1] if frame.rotation % 180 else size, rate, frame.rotation


def _to_rgb(image: Image.Image, path: pathlib.Path, done: list[str]) -> Image.Image:
  """Any mode as 8-bit RGB; adds to `done` what a person would want to know."""
  if image.mode == "F":
    raise UserError(
      f"{path} holds floating-point numbers, whose white is unknown; save it with 8 or 16 bits"
    )
  if image.mode == "I" or image.mode.startswith("I;16"):
    done.append("16 bits made 8")
    # 16-bit PNGs come as 32-bit integers in some versions of Pillow
    deep = np.asarray(image).astype(np.float32) / _SIXTEEN
    image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  if image.getextrema()[3][0] < 255:
    done.append("transparency shown on black")
  black = Image.new("RGBA", image.size, (0, 0, 0, 255))
  return Image.alpha_composite(black, image).convert("RGB")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
  """The largest centred part of the wanted shape, resampled to height x width in one go."""
  if image.size == (width, height):
    return image
  scale = max(height / image.height, width / image.width)
  part_h, part_w = height / scale, width / scale
  left, top = (image.width - part_w) / 2, (image.height - part_h) / 2
  box = (
    max(0.0, left),
    max(0.0, top),
    min(image.width, left + part_w),
    min(image.height, top + part_h),
  )
  return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _said(
  path: pathlib.Path, size: tuple[int, int], wanted: tuple[int, int], done: list[str]
) -> str:
  """One line of what was done; '' for nothing. Sizes are height x width."""
  done = [*done, *_resizing(size, wanted)]
  return f"{path.name}: {size[0]}x{size[1]}, {', '.join(done)}" if done else ""


def _resizing(size: tuple[int, int], wanted: tuple[int, int]) -> Iterator[str]:
  if size == wanted:
    return
  scale = max(wanted[0] / size[0], wanted[1] / size[1])
  yield f"scaled by {scale:.3g} to cover {wanted[0]}x{wanted[1]}"
  for side, have, want in zip(("height", "width"), size, wanted, strict=True):
    cropped = 1 - want / (have * scale)
    if cropped > 0.005:
      yield f"{cropped:.0%} of its {side} cropped"
