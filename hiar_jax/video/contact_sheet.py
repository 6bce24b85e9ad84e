"""Contact sheets: many videos as one picture that a person can read."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hiar_jax.errors import UserError
from hiar_jax.video.frames import checked_frames, to_uint8

_INK, _PAPER, _QUIET, _ACCENT = (32, 32, 32), (255, 255, 255), (150, 150, 150), (214, 96, 40)


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
