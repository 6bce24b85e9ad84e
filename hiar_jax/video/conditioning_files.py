"""Images and videos of any format and size as uint8 frames [F H W 3] of a wanted size.

The frames are scaled until they cover the size, and centre-cropped. Every reader also returns one
line on what it changed, '' for nothing.
"""

from collections import deque
import io
import os
import pathlib
import warnings

import av
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from hiar_jax.errors import UserError
from hiar_jax.video import foreign_files, video_file

_FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
_VIDEOS = "MP4, MOV, WebM, MKV, AVI or MPEG"
_SIXTEEN_BIT = 257  # 65535 / 255
_RATE_TOLERANCE = 1e-3  # frames a second; containers round their rates
_LEAST_CROP = 0.005  # cropped shares below it would be printed as 0 %
_SAME_COLOURS = 2  # levels of 255: profiles of sRGB itself differ by rounding
# Brands of ISO/IEC 23008-12 for pictures in HEVC; mif1 and msf1 do not name the codec.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def read_image(
  path: str | os.PathLike,
  height: int,
  width: int,
  formats: tuple[str, ...] = foreign_files.PICTURES,
) -> tuple[np.ndarray, str]:
  """Reads (uint8 [1 H W 3], changes): rotated by its EXIF orientation, in sRGB by its colour
  profile, alpha composed over black.

  Of an animation the first frame is used. formats: those of Pillow that are read. Raises UserError
  where the file is missing, no image, empty, cut off, or of a pixel type without a known white.
  """
  path = _existing(path, "image")
  changes = []
  try:
    with warnings.catch_warnings():
      # Pillow warns of images of 90 megapixels or more; from twice that it raises
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with foreign_files.open_picture(path, formats) as stored:
        if getattr(stored, "n_frames", 1) > 1:
          changes.append(f"the first of {stored.n_frames} frames")
        if stored.getexif().get(ExifTags.Base.Orientation, 1) != 1:
          changes.append("turned upright by its EXIF note")
        image = ImageOps.exif_transpose(stored)
        image.load()  # decodes now, inside the try: Pillow opens lazily
        picture = _cover(_to_rgb(image, path, changes), height, width)
  except Image.UnidentifiedImageError as error:
    _refuse_heic(path)
    raise UserError(
      f"{path} is not an image; give a {_FORMATS} file (a video is given as --video)"
    ) from error
  except Image.DecompressionBombError as error:
    raise UserError(f"{path} has too many pixels ({error}); scale it down first") from error
  except foreign_files.Unusable as error:
    raise UserError(f"{path} is a damaged or cut off image ({error}); save it again") from error
  return np.asarray(picture)[None], _message(path, image.size[::-1], (height, width), changes)


def read_video(
  path: str | os.PathLike,
  height: int,
  width: int,
  fps: float,
  last: int | None = None,
  formats: tuple[str, ...] = foreign_files.VIDEOS,
) -> tuple[np.ndarray, str]:
  """Reads (uint8 [F H W 3], changes): the frames on screen at 0, 1/fps, 2/fps, ... seconds.

  They are as players show them: upright, of square pixels, progressive, in BT.709, over black.
  last: the number of frames kept, those at the end; None keeps all. formats: those of FFmpeg that
  are read. Raises UserError where the file is missing, no video, empty, damaged or cut off.
  """
  path = _existing(path, "video")
  _refuse_heic(path)  # FFmpeg would show one tile of it
  try:
    # only the last frames are held, but all are decoded: the file is then known to be whole
    kept, total, first = deque(maxlen=last), 0, None
    with foreign_files.open_video(path, formats) as container:
      film = video_file.Film(container)
      sound = bool(container.streams.audio)
      for frame, repeats in film.resampled(fps):
        first = first or frame
        if repeats:
          kept.extend([film.look.cover(frame, height, width)] * repeats)
        total += repeats
      rate = film.rate
  except av.error.InvalidDataError as error:
    raise UserError(
      f"{path} is not a video, or a damaged one; give a {_VIDEOS} file (a picture is given as "
      "--image)"
    ) from error
  except (foreign_files.Unusable, av.error.FFmpegError) as error:
    raise UserError(f"{path} cannot be used ({error}); give a {_VIDEOS} file") from error
  if not kept:
    raise UserError(f"{path} shows no frame at {fps:g} frames a second; give a longer video")
  size, changes = film.look.size(first), list(film.look.changes)
  if abs(rate - fps) > _RATE_TOLERANCE:
    changes.append(f"resampled from {rate:g} to {fps:g} frames a second")
  if len(kept) < total:
    changes.append(f"the last {len(kept)} of {total} frames")
  if sound:
    changes.append("without its sound")
  return np.stack(kept), _message(path, size, (height, width), changes)


def _existing(path: str | os.PathLike, kind: str) -> pathlib.Path:
  path = pathlib.Path(path)
  # os.path's answer: a Path raises for names that no file has
  if not os.path.isfile(path):
    what = "is a directory" if os.path.isdir(path) else "does not exist"
    raise UserError(f"{kind} {path} {what}; give the path of a file")
  if not path.stat().st_size:
    raise UserError(f"{kind} {path} is empty; give another file, or save it again")
  return path


def is_heic(head: bytes) -> bool:
  """Whether a file with these first bytes, 64 or more, is a picture as iPhones store it."""
  # a head of AVIF, which Pillow reads, may begin with mif1 and name avif later
  return head[4:8] == b"ftyp" and head[8:12] in _HEIC and b"avif" not in head[:64]


def _refuse_heic(path: pathlib.Path) -> None:
  with open(path, "rb") as file:
    if is_heic(file.read(64)):
      raise UserError(f"{path} is a HEIC picture, which is not read here; save it as JPEG")


def _to_srgb(image: Image.Image, changes: list[str]) -> Image.Image:
  """Converts from the colour profile that the picture names, if any, to sRGB."""
  content = image.info.get("icc_profile")
  if not content:
    return image
  if image.mode == "P":
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = " ".join(ImageCms.getProfileDescription(profile).split())
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    converted = ImageCms.profileToProfile(
      image, profile, ImageCms.createProfile("sRGB"), outputMode=mode
    )
  except (ImageCms.PyCMSError, OSError, ValueError):
    # damaged, or of other channels than the picture
    changes.append("its colour profile left out, which cannot be used")
    return image
  if image.mode == mode:
    change = np.asarray(converted, np.int16) - np.asarray(image)
    if np.abs(change).max() <= _SAME_COLOURS:
      return image
  changes.append(f"made sRGB from {name}")
  return converted


def _to_rgb(image: Image.Image, path: pathlib.Path, changes: list[str]) -> Image.Image:
  """Converts any mode to 8-bit RGB; appends visible losses to `changes`."""
  if image.mode == "F":
    raise UserError(
      f"{path} holds floating-point numbers, whose white is unknown; save it with 8 or 16 bits"
    )
  if image.mode == "I" or image.mode.startswith("I;16"):
    changes.append("16 bits made 8")
    # Pillow's own conversion clips at 255 instead of scaling. Mode "I": 16-bit PNGs are 32-bit
    # integers in some versions of Pillow.
    scaled = np.asarray(image).astype(np.float32) / _SIXTEEN_BIT
    image = Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
  image = _to_srgb(image, changes)
  if not image.has_transparency_data:
    return image.convert("RGB")
  image = image.convert("RGBA")
  if image.getextrema()[3][0] < 255:  # the least alpha: many images have an opaque alpha channel
    changes.append("transparency shown on black")
  black = Image.new("RGBA", image.size, (0, 0, 0, 255))
  return Image.alpha_composite(black, image).convert("RGB")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
  """Resamples the largest centred part of the wanted aspect ratio to height x width."""
  if image.size == (width, height):
    return image
  scale = max(height / image.height, width / image.width)
  part_h, part_w = height / scale, width / scale
  left, top = (image.width - part_w) / 2, (image.height - part_h) / 2
  # One resampling with a fractional box: cropping a resized image would round to whole pixels.
  # Rounding of the division may leave the image by an ulp, which Pillow refuses.
  box = (
    max(0.0, left),
    max(0.0, top),
    min(image.width, left + part_w),
    min(image.height, top + part_h),
  )
  return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _message(
  path: pathlib.Path, size: tuple[int, int], wanted: tuple[int, int], changes: list[str]
) -> str:
  """One line on the changes and on the resizing, '' for none. Sizes are (height, width)."""
  changes = list(changes)
  if size != wanted:
    scale = max(wanted[0] / size[0], wanted[1] / size[1])
    changes.append(f"scaled by {scale:.3g} to cover {wanted[0]}x{wanted[1]}")
    for side, have, want in zip(("height", "width"), size, wanted, strict=True):
      cropped = 1 - want / (have * scale)
      if cropped > _LEAST_CROP:
        changes.append(f"{cropped:.0%} of its {side} cropped")
  return f"{path.name}: {size[0]}x{size[1]}, {', '.join(changes)}" if changes else ""
