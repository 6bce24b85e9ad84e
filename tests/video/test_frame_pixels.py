"""Decoded frames have the colours of the standards' formulas, whatever their format and size."""

import av
import numpy as np
import pytest

from hiar_jax.video import conditioning_files, frame_pixels, mp4

# ITU-T H.273: the weights of red and blue in luma, by the number of the matrix
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # BT.709, 601, 2020


def planes_of(rgb, matrix, levels=1):
  """Luma and both chromas of limited range, floats; levels: 1 for 8 bits, 4 for 10."""
  red, blue = MATRICES[matrix]
  rgb = np.asarray(rgb, float) / 255
  y = rgb @ [red, 1 - red - blue, blue]
  u, v = (rgb[..., 2] - y) / (2 - 2 * blue), (rgb[..., 0] - y) / (2 - 2 * red)
  return (219 * y + 16) * levels, (224 * u + 128) * levels, (224 * v + 128) * levels


def rgb_of(planes, matrix, levels=1):
  """The inverse of `planes_of`."""
  red, blue = MATRICES[matrix]
  y, u, v = (np.asarray(plane, float) / levels for plane in planes)
  y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
  r, b = y + (2 - 2 * red) * v, y + (2 - 2 * blue) * u
  return 255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)


def flat_frame(values, form, matrix, height=32, width=32):
  """A frame of one Y, U, V."""
  frame = av.VideoFrame(width, height, form)
  for plane, value in zip(frame.planes, values, strict=True):
    kind = np.uint16 if "10" in form else np.uint8
    plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
  frame.colorspace, frame.color_range = matrix, 1
  return frame


@pytest.mark.parametrize("size", [32, 20, 50])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("form", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_colours_are_exact(form, matrix, size):
  """At the stored size, below and above it: each colour within rounding, and none darker."""
  levels = 4 if "10" in form else 1
  errors = []
  for colour in np.random.default_rng(0).integers(20, 236, (200, 3)):
    values = np.rint(planes_of(colour, matrix, levels)).astype(int)
    found = frame_pixels.cover(flat_frame(values, form, matrix), size, size)
    assert (found == found[0, 0]).all()
    errors.append(found[0, 0] - np.clip(rgb_of(values, matrix, levels), 0, 255))
  assert np.abs(errors).max() <= 0.52  # swscale's coefficients have 14 bits
  assert np.abs(np.mean(errors, 0)).max() <= 0.1


@pytest.mark.parametrize("scale, change", [(1, 2.5), (8, 0.8)])
def test_eight_continuations_keep_the_colours(tmp_path, scale, change):
  """A video that is continued is read and written again each time: it gets neither darker nor
  smeared.
  """
  y, x = np.mgrid[:64, :64]
  waves = np.stack([90 * np.sin(x / 9), 90 * np.cos(y / 7), 80 * np.sin((x + y) / 11)], -1)
  start = np.repeat((128 + waves).astype(np.uint8)[None], 3, 0)
  frames = start
  for k in range(8):
    path = mp4.write_mp4(tmp_path / f"{k}.mp4", frames, 8, scale=scale)
    frames, _ = conditioning_files.read_video(path, 64, 64, 8)
  error = frames.astype(int) - start
  assert np.abs(error.mean((0, 1, 2))).max() <= 1, error.mean((0, 1, 2))
  assert np.abs(error).mean() <= change, np.abs(error).mean()
