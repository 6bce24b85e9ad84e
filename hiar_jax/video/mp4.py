"""Videos and pictures on disk: H.264 mp4 with its provenance inside, PNG, and contact sheets that a
person can read.

Every file is written under a hidden temporary name in the same directory and renamed when it is
complete, so a path either holds a whole file or nothing new.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import errno
from fractions import Fraction
import io
import itertools
import json
import os
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic

_INK, _PAPER, _QUIET, _ACCENT = (32, 32, 32), (255, 255, 255), (150, 150, 150), (214, 96, 40)


def to_uint8(frames) -> np.ndarray:
  """Float frames in [-1, 1] of any shape -> uint8 in 0..255, rounded and clipped; uint8 passes
  through.
  """
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames
  return np.clip(np.rint((frames.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_float(frames) -> np.ndarray:
  """uint8 frames of any shape -> float32 in [-1, 1]; float frames pass through as float32."""
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames.astype(np.float32) / 127.5 - 1.0
  return frames.astype(np.float32)


def write_mp4(
  path,
  frames: np.ndarray | Iterable[np.ndarray],
  fps: float = 16,
  metadata: Mapping[str, str] | None = None,
  *,
  scale: int = 1,
  crf: int = 14,
) -> Path:
  """Encodes frames uint8 [f, H, W, 3] as H.264 (yuv420p, BT.709), atomically, and returns the path.

  `frames` may also be an iterable of such arrays, pieces of one video, which are encoded one by one
  and need not be in memory together; where it raises, nothing is left. `metadata` (prompt, seed,
  config, ...) is stored as JSON in the container's comment; `read_mp4` and `ffprobe -show_format`
  show it. `scale` enlarges by that integer factor with nearest neighbour, so that small videos can
  be watched and keep their colours in spite of the halved chroma. `crf` is x264's quality, 0 (best)
  .. 51. An odd side gains a copy of its last row or column, because yuv420p needs even sides.

  Raises UserError for another dtype or shape, no frames, or a scale or fps that is not positive.
  """
  path = Path(path)
  if not isinstance(scale, int) or scale < 1 or not fps > 0:
    raise UserError(
      f"{path}: scale is {scale!r} and fps is {fps!r}; give a whole scale >= 1 and fps > 0"
    )
  pieces = iter([frames] if hasattr(frames, "shape") else frames)
  first = checked_frames(path, next(pieces, np.zeros((0, 0, 0, 3), np.uint8)))
  with _whole_file(path) as file, av.open(file, "w", format="mp4") as container:
    container.metadata["comment"] = json.dumps(
      dict(metadata or {}), ensure_ascii=False, sort_keys=True
    )
    stream = container.add_stream(
      "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)}
    )
    height, width = (side * scale + side * scale % 2 for side in first.shape[1:3])
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    # BT.709 (ITU-T H.273), said in the file
    context.colorspace = context.color_primaries = context.color_trc = 1
    for piece in itertools.chain([first], pieces):
      if checked_frames(path, piece).shape[1:] != first.shape[1:]:
        raise UserError(
          f"{path}: a piece has frames of {piece.shape[1:]}, the first one of {first.shape[1:]}; "
          "expected one size"
        )
      for frame in piece:
        container.mux(stream.encode(yuv_frame(frame, height, width, scale)))
    container.mux(stream.encode())
  return path


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[io.BufferedRandom]:
  """A file to write that gets its name when it is complete; as files.write_atomic, for what need
  not be in memory at once.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with explained(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      file = open(temporary, "w+b")
    with file:
      # what else may go wrong in there is not this file's
      with explained(path, full_disk_alone=True):
        yield file
      with explained(path):
        file.flush()
        os.fsync(file.fileno())
    with explained(path):
      os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


@contextlib.contextmanager
def explained(path: Path, full_disk_alone: bool = False) -> Iterator[None]:
  """What goes wrong while `path` is written, as a UserError of one line."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"no space left on the disk of {path}; free some space and run the same command"
      ) from error
    if full_disk_alone:
      raise
    raise UserError(
      f"{path}: cannot be written ({error.strerror}); choose another place"
    ) from error


def read_mp4(path, *, scale: int = 1) -> tuple[np.ndarray, float, dict[str, str]]:
  """Decodes the first video stream: (frames uint8 [f, H, W, 3], frames per second, metadata).

  `scale` > 1 undoes `write_mp4`'s enlargement by the mean over each scale x scale square. Metadata
  is {} in a file that carries no JSON comment. Raises UserError for a file that is missing,
  damaged, or without video.
  """
  try:
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      frames = [_rgb(frame) for frame in container.decode(stream)]
      fps, comment = float(stream.average_rate or 0), container.metadata.get("comment", "")
  except FileNotFoundError:
    raise UserError(f"{path}: no such video file") from None
  except (av.error.FFmpegError, IndexError) as error:
    raise UserError(f"{path}: not a readable video ({error}); write it again") from None
  if not frames:
    raise UserError(f"{path}: the video holds no frames; write it again")
  return _pooled(np.stack(frames), scale), fps, _json_object(comment)


def read_metadata(path) -> dict | None:
  """What `write_mp4` was told of a video, {} where nobody said anything; None where this is no
  video file. Decodes nothing.
  """
  try:
    with av.open(str(path)) as container:
      return (
        _json_object(container.metadata.get("comment", "")) if container.streams.video else None
      )
  except (av.error.FFmpegError, OSError):
    return None


def write_png(path, image: np.ndarray) -> Path:
  """Writes an image uint8 [H, W, 3] or [H, W] as PNG, atomically, and returns the path."""
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3):
    raise UserError(
      f"{path}: image is {image.dtype} {image.shape}; expected uint8 [H, W, 3] or [H, W]"
    )
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return write_atomic(path, buffer.getvalue())


def contact_sheet(
  videos: Mapping[str, np.ndarray],
  *,
  columns: int = 12,
  every: int | None = None,
  train_frames: int | None = None,
  block_frames: int | None = None,
  scale: int | None = None,
  title: str = "",
) -> np.ndarray:
  """One row a video, caption above it, frames left to right: an image uint8 [H', W', 3].

  Args:
    videos: caption -> frames [f, H, W, 3], uint8 or float in [-1, 1]; all of one frame size.
    columns: how many frames a row shows, spread evenly from the first to the last.
    every: shows frames 0, every, 2 * every, ... instead of `columns` frames.
    train_frames: pixel frames of a training clip; frames beyond it carry an orange bar instead of a
    grey one.
    block_frames: pixel frames of a block (the first block has `block_frames` frames too); where
      consecutive pictures belong to different blocks the gap between them holds a thin line.
    scale: integer enlargement; by default the smallest that makes a frame at least 96 pixels high.
    title: one line above everything.

  Raises UserError for no videos, wrong shapes, or frame sizes that differ.
  """
  clips = {caption: checked_frames(caption, to_uint8(video)) for caption, video in videos.items()}
  sizes = {clip.shape[1:] for clip in clips.values()}
  if len(sizes) != 1 or columns < 1 or (every is not None and every < 1):
    raise UserError(
      f"contact sheet: got frame sizes {sorted(sizes)}, columns={columns}, every={every}; expected "
      "videos of one frame size, columns >= 1 and every >= 1"
    )
  height, width, _ = next(iter(sizes))
  scale = scale or max(1, -(-96 // height))
  shown = [
    (caption, clip, _shown_frames(len(clip), columns, every)) for caption, clip in clips.items()
  ]
  header = _label(title, 15, _INK) if title else None
  rows = [
    _sheet_row(caption, clip, index, scale, train_frames, block_frames)
    for caption, clip, index in shown
  ]
  rows = ([header] if header is not None else []) + rows
  canvas = np.full(
    (sum(len(row) for row in rows) + 8, max(row.shape[1] for row in rows) + 16, 3), 255, np.uint8
  )
  top = 4
  for row in rows:
    canvas[top : top + len(row), 8 : 8 + row.shape[1]] = row
    top += len(row)
  return canvas


def _sheet_row(caption, clip, shown, scale, train_frames, block_frames) -> np.ndarray:
  gap, strip = 6, 15
  height, width = clip.shape[1] * scale, clip.shape[2] * scale
  pictures = [clip[i].repeat(scale, 0).repeat(scale, 1) for i in shown]
  body = Image.new("RGB", (len(shown) * (width + gap) - gap, height + strip + 8), _PAPER)
  draw = ImageDraw.Draw(body)
  font = ImageFont.load_default(10)
  for place, (i, picture) in enumerate(zip(shown, pictures, strict=True)):
    left = place * (width + gap)
    body.paste(Image.fromarray(picture), (left, 0))
    colour = _ACCENT if train_frames is not None and i >= train_frames else _QUIET
    draw.rectangle((left, height, left + width - 1, height + 1), fill=colour)
    draw.text((left + 1, height + 2), str(i), font=font, fill=colour)
    if block_frames and place and i // block_frames != shown[place - 1] // block_frames:
      draw.line((left - gap // 2, 0, left - gap // 2, height + 1), fill=_QUIET)
  label, body = _label(caption, 14, _INK), np.asarray(body)
  row = np.full((len(label) + len(body), max(label.shape[1], body.shape[1]), 3), 255, np.uint8)
  row[: len(label), : label.shape[1]] = label
  row[len(label) :, : body.shape[1]] = body
  return row


def _label(text: str, size: int, colour) -> np.ndarray:
  font = ImageFont.load_default(size)
  image = Image.new("RGB", (int(font.getlength(text)) + 2, size + 8), _PAPER)
  ImageDraw.Draw(image).text((0, 2), text, font=font, fill=colour)
  return np.asarray(image)


def _shown_frames(frames: int, columns: int, every: int | None) -> list[int]:
  if every is not None:
    return list(range(0, frames, every))
  return sorted(set(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int).tolist()))


def checked_frames(name, frames) -> np.ndarray:
  """uint8 [f, H, W, 3] with f >= 1; UserError for anything else."""
  frames = np.asarray(frames)
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
    raise UserError(
      f"{name}: frames are {frames.dtype} {frames.shape}; expected uint8 [f, H, W, 3] with f >= 1"
    )
  return frames


def yuv_frame(frame: np.ndarray, height: int, width: int, scale: int) -> av.VideoFrame:
  """uint8 [H, W, 3] enlarged by `scale` and filled up to height x width, as yuv420p in BT.709."""
  frame = frame.repeat(scale, 0).repeat(scale, 1)
  frame = np.pad(
    frame, ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)), mode="edge"
  )
  rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
  return rgb.reformat(format="yuv420p", dst_colorspace="ITU709")


def _rgb(frame: av.VideoFrame) -> np.ndarray:
  # swscale would guess BT.601 for a stream tagged BT.709 and shift the colours.
  source = "ITU709" if frame.colorspace == 1 else None
  return frame.reformat(format="rgb24", src_colorspace=source).to_ndarray()


def _pooled(frames: np.ndarray, scale: int) -> np.ndarray:
  if scale == 1:
    return frames
  f, height, width, _ = frames.shape
  h, w = height // scale, width // scale
  squares = frames[:, : h * scale, : w * scale].reshape(f, h, scale, w, scale, 3)
  return np.rint(squares.mean((2, 4))).astype(np.uint8)


def _json_object(text: str) -> dict:
  try:
    value = json.loads(text)
  except ValueError:  # somebody else's comment, in prose
    return {}
  return value if isinstance(value, dict) else {}
