"""The drift numbers on pictures whose value is known."""

import json

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.evaluation import drift


def painted(*colours, size=8):
  return np.broadcast_to(
    np.asarray(colours, np.uint8)[:, None, None], (len(colours), size, size, 3)
  )


def test_saturation_is_hsv():
  got = drift.saturation(painted((255, 0, 0), (90, 90, 90), (0, 0, 0), (200, 100, 150)))
  np.testing.assert_allclose(got, [1, 0, 0, 0.5], atol=1e-5)


def test_sharpness_is_the_variance_of_the_laplacian():
  frames = np.zeros((2, 8, 8, 3), np.uint8)
  frames[0, 4, 4] = 100  # its Laplacian: -400 there, 100 at four neighbours
  np.testing.assert_allclose(drift.sharpness(frames), [(16 + 4) * 100**2 / 64, 0], rtol=1e-4)


def test_frame_difference():
  got = drift.frame_difference(painted((0, 0, 0), (51, 51, 51), (51, 51, 51), (0, 51, 51)))
  np.testing.assert_allclose(got, [np.nan, 0.2, 0, 0.2 / 3], atol=1e-5)


def test_segments_cover_every_frame_once():
  for frames in (5, 36, 81):
    parts = drift.segments(frames)
    assert [i for part in parts for i in range(frames)[part]] == list(range(frames))
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1
  with pytest.raises(UserError, match="4 frames"):
    drift.segments(4)


def test_trend_of_a_line():
  values = np.stack([np.arange(20.0), np.arange(20.0)[::-1]])
  up, both = drift.trend(values[:1]), drift.trend(values)
  assert up["segments"] == pytest.approx([1.5, 5.5, 9.5, 13.5, 17.5])
  assert up["slope"] == pytest.approx(4) and up["relative_slope"] == pytest.approx(4 / 9.5)
  assert both["slope"] == pytest.approx(0, abs=1e-9)
  # frames 0-2 against 17-19; opposite drifts do not cancel
  assert both["start_end"] == pytest.approx(17)


def test_start_end_uses_fifteen_percent():
  values = np.zeros((1, 40))
  values[0, :6], values[0, -6:] = 1, 3
  assert drift.trend(values)["start_end"] == pytest.approx(2)


def test_measure_tells_a_fading_video():
  rng = np.random.default_rng(0)
  noise = rng.uniform(-1, 1, (2, 20, 8, 8, 3)).astype(np.float32)
  fading = noise * np.linspace(1, 0, 20)[:, None, None, None]
  still, faded = drift.measure(noise), drift.measure(fading)
  assert faded["sharpness"]["slope"] < -0.2 * faded["sharpness"]["mean"]
  assert abs(still["sharpness"]["relative_slope"]) < 0.05
  assert faded["saturation"]["slope"] < 0 and faded["frame_difference"]["slope"] < 0
  json.dumps(faded, allow_nan=False)


def test_measure_rejects_one_video_without_its_axis():
  with pytest.raises(UserError, match="expected"):
    drift.measure(np.zeros((20, 8, 8, 3)))
