"""Contact sheets: frames of many videos in one image, a row each."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hiar_jax.errors import UserError
from hiar_jax.video.frames import checked_frames, to_uint8

# RGB
_INK = (32, 32, 32)
_PAPER = (255, 255, 255)
_QUIET = (150, 150, 150)
_ACCENT = (214, 96, 40)
UNMADE = 128  # the grey of a frame that is not made yet
# pixels
_GAP = 6  # between the frames of a row
_STRIP = 15  # below a frame: its bar and its number


def contact_sheet(
  videos: Mapping[str, np.ndarray],
  *,
  columns: int = 12,
  every: int | None = None,
  train_frames: int | None = None,
  block_frames: int | None = None,
  scale: int | None = None,
  title: str = "",
  made: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
  """Returns an image uint8 [H' W' 3]: a row per video, its caption above, frames left to right.

  Args:
    videos: caption -> frames [f H W 3], uint8 or float in [-1, 1]; all of one frame size.
    columns: frames in a row, spread evenly from the first to the last.
    every: takes frames 0, every, 2 * every, ... instead of `columns` frames.
    train_frames: pixel frames of a training clip; later frames have an orange bar, not a grey one.
    block_frames: pixel frames of a block (the first block has `block_frames` frames too); a thin
      line in the gap separates frames of different blocks.
    scale: integer enlargement; by default the smallest that makes a frame at least 96 pixels high.
    title: one line above everything.
    made: caption -> bool [f], for some of the videos; frames that are not made are plain grey.

  Raises UserError for no videos, wrong shapes, or frame sizes that differ.
  """
  clips = {caption: checked_frames(caption, to_uint8(video)) for caption, video in videos.items()}
  sizes = {clip.shape[1:] for clip in clips.values()}
  if len(sizes) != 1 or columns < 1 or (every is not None and every < 1):
    raise UserError(
      f"contact sheet: got frame sizes {sorted(sizes)}, columns={columns}, every={every}; expected "
      "videos of one frame size, columns >= 1 and every >= 1"
    )
  ((height, _, _),) = sizes
  scale = scale or max(1, -(-96 // height))
  rows = [_label(title, 15)] if title else []
  for caption, clip in clips.items():
    if every is not None:
      indices = list(range(0, len(clip), every))
    else:
      # a set: rounding may hit a frame twice
      spread = np.linspace(0, len(clip) - 1, min(columns, len(clip)))
      indices = sorted(set(spread.round().astype(int).tolist()))
    there = (made or {}).get(caption, np.ones(len(clip), bool))
    pictures = {i: clip[i] if there[i] else np.full_like(clip[i], UNMADE) for i in indices}
    rows.append(_sheet_row(caption, pictures, scale, train_frames, block_frames))
  # white margins: 4 pixels above and below, 8 at the sides
  canvas = np.full(
    (sum(len(row) for row in rows) + 8, max(row.shape[1] for row in rows) + 16, 3), 255, np.uint8
  )
  top = 4
  for row in rows:
    canvas[top : top + len(row), 8 : 8 + row.shape[1]] = row
    top += len(row)
  return canvas


def _sheet_row(
  caption: str,
  pictures: Mapping[int, np.ndarray],
  scale: int,
  train_frames: int | None,
  block_frames: int | None,
) -> np.ndarray:
  """One row, uint8 [H' W' 3]: the caption above frames of a clip, number -> uint8 [H W 3]."""
  indices = list(pictures)
  height, width = (side * scale for side in pictures[indices[0]].shape[:2])
  # 8: the distance to the next row
  size = (len(indices) * (width + _GAP) - _GAP, height + _STRIP + 8)
  canvas = Image.new("RGB", size, _PAPER)
  draw = ImageDraw.Draw(canvas)
  font = ImageFont.load_default(10)
  for column, i in enumerate(indices):
    left = column * (width + _GAP)
    # nearest neighbour: the pixels of small videos stay visible
    canvas.paste(Image.fromarray(pictures[i].repeat(scale, 0).repeat(scale, 1)), (left, 0))
    colour = _ACCENT if train_frames is not None and i >= train_frames else _QUIET
    draw.rectangle((left, height, left + width - 1, height + 1), fill=colour)
    draw.text((left + 1, height + 2), str(i), font=font, fill=colour)
    if block_frames and column and i // block_frames != indices[column - 1] // block_frames:
      draw.line((left - _GAP // 2, 0, left - _GAP // 2, height + 1), fill=_QUIET)
  label = _label(caption, 14)
  body = np.asarray(canvas)
  # the caption may be wider than the frames, or narrower
  row = np.full((len(label) + len(body), max(label.shape[1], body.shape[1]), 3), 255, np.uint8)
  row[: len(label), : label.shape[1]] = label
  row[len(label) :, : body.shape[1]] = body
  return row


def _label(text: str, size: int) -> np.ndarray:
  """A line of text as an image uint8 [H' W' 3]; size: of the font, in pixels."""
  font = ImageFont.load_default(size)
  image = Image.new("RGB", (int(font.getlength(text)) + 2, size + 8), _PAPER)
  ImageDraw.Draw(image).text((0, 2), text, font=font, fill=_INK)
  return np.asarray(image)
