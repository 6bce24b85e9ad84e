"""The screen of the shapes world: a grey square in the middle of the picture, in front of a shape
that passes behind it.

The shape starts between a wall and the screen, is wholly in sight for SHOWN_FRAMES, goes under,
stays wholly out of sight for a given number of frames, comes out on the opposite side, and bounces
off the wall there. The square is as large as that takes and lies on whole pixels, so the picture is
known exactly. Lengths in pixels, speeds in pixels per frame; the screen is given by its pixels
[low, high), the same on both axes.
"""

import math

import numpy as np

from hiar_jax.errors import UserError

SHOWN_FRAMES = 9  # of a clip's beginning, at least, with the shape wholly in sight
RETURN_FRAMES = 3  # of its end, at least
GREY = 0.6  # brighter than all textures


def edges(size: int, radius: float, speed: float, hidden: int) -> tuple[int, int]:
  """Returns (low, high) of a screen that hides a shape wholly for at least `hidden` frames."""
  low = math.floor((size - 2 * radius - hidden * speed) / 2)
  return low, size - low


def check(size: int, frames: int, radius: float, speed: float, hidden: int) -> None:
  """Raises UserError where a shape could not be seen for long enough before and after."""
  if hidden < 1:
    raise UserError(f"hidden = {hidden}: expected a number of frames, or 0 for no screen")
  low, high = edges(size, radius, speed, hidden)
  if low - radius - (SHOWN_FRAMES - 1) * speed < radius:
    raise UserError(
      f"hidden = {hidden}: a picture of {size} px has no room for {SHOWN_FRAMES} frames in sight "
      "before such a screen; use smaller values of hidden, shape_size or pace"
    )
  # One that starts at the wall is the last to be wholly in sight again.
  needed = math.ceil(high / speed) + RETURN_FRAMES
  if frames < needed:
    raise UserError(
      f"hidden = {hidden}: in {frames} frames not every shape comes back into sight; use at least "
      f"{needed} frames, or a higher pace"
    )


def sample_centre(
  rng: np.random.Generator,
  velocity: np.ndarray,
  size: int,
  radius: float,
  screen: tuple[int, int],
) -> np.ndarray:
  """Draws the centre [2] at t = 0 of a shape on its way to the screen. velocity: [2], along an
  axis.
  """
  low, high = screen
  shown = (SHOWN_FRAMES - 1) * np.abs(velocity).max()
  # The order of the draws is part of the data sets of a seed.
  along = rng.uniform(radius, low - radius - shown)
  across = rng.uniform(low + radius, high - radius)
  along = along if velocity.sum() > 0 else size - along
  return np.where(velocity != 0, along, across)


def draw(images: np.ndarray, screen: tuple[int, int] | None) -> np.ndarray:
  """Returns images [..., H, W, 3] in [0, 1] with the screen, if any, in front of them."""
  if screen is None:
    return images
  low, high = screen
  covered = np.array(images)
  covered[..., low:high, low:high, :] = GREY
  return covered
