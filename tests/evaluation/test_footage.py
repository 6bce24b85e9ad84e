"""Measures against footage, on videos that are known by construction."""

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.evaluation import footage

SIZE, FRAMES, LENGTH = 24, 9, 40


def bars(count: int, shift: float = 0.0, speed: float = 1.0) -> np.ndarray:
  """Frames uint8 [count SIZE SIZE 3] of a pattern of orange and blue bars that moves."""
  x = np.arange(SIZE)[None] + speed * np.arange(count)[:, None] + shift
  wave = np.sin(2 * np.pi * x / 12)[:, None, :, None] * np.ones((1, SIZE, 1, 1))
  colour = np.asarray([60.0, 10.0, -40.0])
  return np.rint(np.clip(120 + wave * colour, 0, 255)).astype(np.uint8)


CLIPS = {"bars": np.stack([bars(FRAMES, shift) for shift in (0, 3, 7)])}


def measured(video, prompt: str = "bars", clips=CLIPS) -> dict:
  return footage.measure(video[None], [prompt], clips)


def test_more_of_the_footage_is_like_it():
  found = measured(bars(LENGTH))
  for name in ("motion", "sharpness", "saturation", "brightness", "contrast"):
    assert found[name]["total"] == pytest.approx(1, abs=0.05), name
    assert found[name]["fifths"] == pytest.approx([1] * 5, abs=0.1), name
  assert found["still"] == found["jumps"] == 0 and found["distance"]["total"] < 1.5
  assert found["frames"] == LENGTH and found["clips"] == 3
  assert "motion 1.0" in footage.line(found) and "jumps 0.0%" in footage.line(found)


def test_a_video_that_freezes():
  video = bars(LENGTH)
  video[16:] = video[16]
  found = measured(video)
  assert found["still"] == pytest.approx(23 / 39)
  assert found["motion"]["fifths"] == pytest.approx([1, 1, 0.125, 0, 0], abs=0.06)
  assert found["jumps"] == 0 and found["distance"]["total"] < 1.5


def test_a_cut_is_one_jump():
  video = np.concatenate([bars(20), bars(20) // 4])
  assert measured(video)["jumps"] == pytest.approx(1 / 39)


def test_a_fade_drifts_away():
  """Contrast and brightness fall to a half, and the distance to the footage grows."""
  level = np.linspace(1, 0.5, LENGTH)[:, None, None, None]
  found = measured(np.rint(bars(LENGTH) * level).astype(np.uint8))
  for name in ("brightness", "contrast"):
    assert np.diff(found[name]["fifths"]).max() < 0
    assert found[name]["fifths"][0] == pytest.approx(0.95, abs=0.03)
    assert found[name]["fifths"][-1] == pytest.approx(0.55, abs=0.03)
  assert np.diff(found["distance"]["fifths"]).min() > 0
  assert found["distance_last_over_first"] > 3


def test_a_blur_loses_sharpness_alone():
  video = bars(LENGTH).astype(float)
  # of a wave along the rows each neighbour's mean is a smaller wave
  smooth = (np.roll(video, 2, 2) + np.roll(video, -2, 2) + 2 * video) / 4
  found = measured(np.rint(smooth).astype(np.uint8))
  assert found["sharpness"]["total"] < 0.7 < 0.9 < found["brightness"]["total"]


def test_a_distance_is_that_of_the_nearest_frame():
  video = np.clip(bars(LENGTH).astype(int) + 5, 0, 255).astype(np.uint8)
  assert measured(video)["distance"]["fifths"] == pytest.approx([5] * 5, abs=0.4)


def test_a_video_is_compared_with_the_clips_of_its_caption():
  clips = {**CLIPS, "dark": CLIPS["bars"] // 4}
  dark = bars(LENGTH) // 4
  assert measured(dark, "dark", clips)["brightness"]["total"] == pytest.approx(1, abs=0.05)
  assert measured(dark, "bars", clips)["brightness"]["total"] == pytest.approx(0.25, abs=0.05)
  # of no caption: all of the footage
  whole = measured(dark, "another", clips)
  assert whole["brightness"]["total"] == pytest.approx(2 * 0.25 / 1.25, abs=0.05)
  assert whole["distance"]["total"] < 1.5


def test_still_and_black_footage_divide_nothing_by_zero():
  black = {"bars": np.zeros((1, FRAMES, SIZE, SIZE, 3), np.uint8)}
  found = measured(bars(LENGTH), clips=black)
  assert np.isfinite([found[name]["total"] for name in ("motion", "sharpness")]).all()
  assert found["still"] == 0 and found["jumps"] == 1


def test_too_short():
  with pytest.raises(UserError, match="the video has 4 frames; measuring per 5 segments"):
    measured(bars(4))
