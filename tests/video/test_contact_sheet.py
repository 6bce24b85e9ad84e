"""Contact sheets: every frame in its order, captions, the training length, blocks."""

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.video.contact_sheet import _ACCENT, _QUIET, UNMADE, contact_sheet


def test_contact_sheet_shows_every_frame_in_order_and_the_training_length():
  grey = np.arange(0, 240, 20, dtype=np.uint8)  # frame i has its own grey level
  video = np.broadcast_to(grey[:, None, None, None], (12, 32, 32, 3))
  sheet = contact_sheet({"first": video, "second": video[::-1]}, columns=4, train_frames=6, scale=2)
  bars = np.flatnonzero((sheet == _ACCENT).all(-1).sum(1) > 64)
  assert len(bars) == 4  # two rows of pictures, two pixels each
  for row, shown in zip((bars[0], bars[2]), ([0, 80, 140, 220], [220, 140, 80, 0]), strict=True):
    pictures = [sheet[row - 32, 8 + 32 + column * (64 + 6), 0] for column in range(4)]
    assert pictures == shown
  orange = (sheet[bars[0]] == _ACCENT).all(-1)
  # frames 7 and 11 lie beyond 6
  assert orange[: 8 + 2 * 70].sum() == 0 and orange[8 + 2 * 70 :].sum() == 2 * 64


def test_contact_sheet_marks_blocks_only_between_blocks():
  video = np.zeros((12, 32, 32, 3), np.uint8)
  sheet = contact_sheet({"": video}, every=1, block_frames=6, scale=1)
  lines = [column for column in range(12 * 38) if (sheet[30:60, 8 + column] == _QUIET).all()]
  assert lines == [6 * 38 - 3]


def test_contact_sheet_grows_with_its_caption_and_scales_small_frames():
  video = np.zeros((1, 32, 32, 3), np.float32)
  short, long = (contact_sheet({caption: video}) for caption in ("a", "a very long caption " * 5))
  assert long.shape[1] > short.shape[1] and short.shape[0] > 96
  assert (short == 128).all(-1).sum() >= 96 * 96  # 0.0 is mid grey


def test_contact_sheet_bad_input():
  for videos in (
    {},
    {"a": np.zeros((2, 8, 8, 3), np.uint8), "b": np.zeros((2, 9, 9, 3), np.uint8)},
  ):
    with pytest.raises(UserError, match="contact sheet"):
      contact_sheet(videos)


def test_frames_that_are_not_made_are_grey():
  video = np.full((4, 96, 96, 3), 200, np.uint8)
  made = {"second": np.asarray([True, False, True, False])}
  sheet = contact_sheet({"first": video, "second": video}, every=1, made=made)
  row, pitch = len(sheet) // 2, 96 + 6
  colours = [
    [tuple(sheet[top + row // 2, 8 + pitch * i + 48]) for i in range(4)] for top in (0, row)
  ]
  light, grey = (200,) * 3, (UNMADE,) * 3
  assert colours == [[light] * 4, [light, grey, light, grey]]
