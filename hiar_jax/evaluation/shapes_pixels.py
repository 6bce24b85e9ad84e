"""Pictures of the shapes world as `shapes_fit` works on them: P = H W pixels in a row, F frames."""

import numpy as np

from hiar_jax.data import shapes_screen, shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, SHAPES, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float


def coverage(shape: np.ndarray, xy: np.ndarray, config: WorldConfig) -> np.ndarray:
  """Returns the coverage [F, P] of one shape per frame, forms [F] at xy [F, 2]."""
  alpha = np.zeros((len(shape), config.size**2), np.float32)
  for i, name in enumerate(SHAPES):
    own = np.flatnonzero(shape == i)
    if own.size:
      mask = shapes_world.alpha_mask(name, xy[own], config.radius, config.size)
      alpha[own] = mask.reshape(own.size, -1)
  return alpha


def backgrounds(config: WorldConfig) -> np.ndarray:
  """Returns all textures, with the screen on them, float32 [backgrounds, P, 3] in [0, 1]."""
  images = np.stack([shapes_world.background_image(name, config) for name in BACKGROUNDS])
  return shapes_screen.draw(images, config.screen).reshape(len(images), -1, 3)


def in_sight(config: WorldConfig) -> np.ndarray:
  """Returns 0 for pixels that the screen covers, 1 for the others: float32 [P]."""
  mask = np.ones((config.size, config.size), np.float32)
  if config.screen is not None:
    low, high = config.screen
    mask[low:high, low:high] = 0
  return mask.ravel()


def unit(videos, config: WorldConfig) -> np.ndarray:
  """Maps videos [n, f, H, W, 3] (uint8, or float in [-1, 1]) to [n, f, P, 3] in [0, 1]."""
  videos = np.asarray(videos)
  if videos.ndim != 5 or videos.shape[2:] != (config.size, config.size, 3):
    raise UserError(
      f"videos have shape {videos.shape}; expected [n, f, {config.size}, {config.size}, 3], "
      "the world's size: measure with the world that the videos were made in"
    )
  n, f = videos.shape[:2]
  return (to_float(videos).reshape(n, f, -1, 3) + 1) / 2


def around(xy: np.ndarray, config: WorldConfig) -> np.ndarray:
  """Returns True for pixels within 16 pixels of the centres xy [F, 2] on both axes, for shapes of
  radius 5.5 (2.9 radii): as far around a shape as a picture of 32 x 32 reaches. [F, P].
  """
  reach = 16 * config.scale * config.shape_size
  x, y = (np.abs(np.arange(config.size) + 0.5 - xy[:, i, None]) < reach for i in (0, 1))
  return (y[:, :, None] & x[:, None, :]).reshape(len(xy), -1)
