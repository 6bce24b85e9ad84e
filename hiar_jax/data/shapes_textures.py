"""The textures behind the shapes: greys .12 to .42, which no shape has."""

import functools

import numpy as np


@functools.lru_cache
def texture(name: str, size: int, reference: int) -> np.ndarray:
  """Returns the texture of a background's name, float32 [size, size, 3] in [0, 1]; the same array
  every time, so callers copy it.

  reference: the image size that the lengths of the patterns are given for.
  """
  fine = 8  # supersampling along each axis
  # Sample points in units of the reference size, so that textures scale with the image.
  axis = (np.arange(size * fine) + 0.5) / fine * reference / size
  x, y = axis[None, :], axis[:, None]
  light = {
    "plain": lambda: 0 * (x + y),
    "striped": lambda: (x + y) % 9 < 4.5,
    "checkered": lambda: (x // 4 + y // 4) % 2,
    "dotted": lambda: (x % 6.4 - 3.2) ** 2 + (y % 6.4 - 3.2) ** 2 < 1.7**2,
    "gradient": lambda: (0 * x + y) / reference * 1.5,
  }[name]().astype(np.float32)
  # Box filter over the fine samples of each pixel.
  grey = 0.12 + 0.2 * light.reshape(size, fine, size, fine).mean((1, 3))
  return np.repeat(grey[..., None], 3, -1).astype(np.float32)
