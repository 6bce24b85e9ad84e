"""Whether a shape of a video first moves as its caption says."""

from typing import NamedTuple

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import WorldConfig

STANDING = 0.25  # share of the prompt's speed below which a clip goes nowhere
WALL = 3.0  # pixels at 32 x 32: a turn this near to a wall is a bounce


class Path(NamedTuple):
  """One shape over f frames: xy [f, 2] centres in pixels, and of each frame, [f], whether it is
  visible, is recognised, is out of sight for longer than a true one.
  """

  xy: np.ndarray
  visible: np.ndarray
  recognised: np.ndarray
  missing: np.ndarray


def heads(path: Path, direction: np.ndarray, speed: float, world: WorldConfig) -> float:
  """Returns 1 where the displacement before the first wall is within 45 degrees of `direction` [2]
  (standing still is wrong), 0 where not, nan where the shape is hidden too long to measure it.

  speed: the caption's, pixels per frame. The first wall is met, of a true shape that starts where
  this one does, after `free_frames`, or earlier where this one is seen to bounce.
  """
  seen = np.flatnonzero(path.visible & path.recognised)
  if len(seen):
    end = seen[0] + free_frames(path.xy[seen[0]], direction, speed, world) + 1
    path = Path(*(array[:end] for array in path))
  if 2 * path.visible.sum() < len(path.visible) and not path.missing.any():
    return np.nan
  frames = np.flatnonzero(path.visible & path.recognised)
  if len(frames) < 2 or 2 * len(frames) < path.visible.sum():
    return 0.0
  xy, frames = _before_the_wall(path.xy[frames], frames, world)
  move, elapsed = xy[-1] - xy[0], frames[-1] - frames[0]
  along, length = move @ direction, np.linalg.norm(move)
  # A path cut short by a bounce must still be as long as the free run of a true clip allows.
  shortest = STANDING * speed * max(elapsed, shapes_world.FREE_FRAMES)
  return float(along >= length * np.sqrt(0.5) and length >= shortest)


def free_frames(start: np.ndarray, direction: np.ndarray, speed: float, world: WorldConfig) -> int:
  """Returns the steps that a true shape takes from `start` [2] before it meets a wall; at least
  those of any true clip, whose start leaves room for them.
  """
  axis = int(np.abs(direction).argmax())
  far = world.size - world.radius - start[axis]
  room = far if direction[axis] > 0 else start[axis] - world.radius
  # 1e-6: a shape that ends at the wall has not met it
  return max(shapes_world.FREE_FRAMES, int(np.floor(room / speed + 1e-6)))


def _before_the_wall(
  path: np.ndarray, frames: np.ndarray, world: WorldConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts a path [f, 2] and its frames at the first bounce on the axis along which it moves most."""
  steps = np.diff(path, axis=0)
  axis = int(np.abs(steps).sum(0).argmax()) if len(steps) else 0
  # Steps under 25 % of a pixel are errors of the fit, not a direction.
  along, least = steps[:, axis], 0.25 * world.scale
  for i in range(1, len(steps)):
    low, high = path[i, axis] - world.radius, world.size - world.radius - path[i, axis]
    wall = -1 if low < high else 1  # side of the nearer wall
    # A step that bounces halfway ends near its start: the turn then shows one step later.
    short = abs(along[i]) <= least and i + 1 < len(steps)
    bounced = along[i - 1] * wall > least and along[i + short] * wall < -least
    if bounced and min(low, high) <= WALL * world.scale:
      return path[: i + 1], frames[: i + 1]
  return path, frames
