"""How well videos of the shapes world do what their prompts ask, measured frame by frame, per fifth
of the video.

Every frame is compared with its nearest true rendering (`fit`). A shape counts as recognised where
that rendering
explains it: squared error at most UNRECOGNISABLE of the squared difference that the shape itself
makes to the picture. An empty frame scores 1 there, a red shape faded to half 0.25, noise far more
than 1; true clips stay under 0.001, and under 0.1 when blurred by a pixel on the plain world
(`data_reference` measures it, also through a codec). What is not recognised has neither the right
colour nor the right form.

A shape that another hides by more than half cannot be judged, so those frames are left out; but one
that stays hidden for longer than a training clip is missing, and wrong.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.evaluation import drift
from hiar_jax.evaluation.shapes_fit import Fit, fit_videos, nearest_background

UNRECOGNISABLE = 0.5  # share of the shape's own squared contrast
HIDDEN = 0.5  # visible share below which a shape is not judged
JUMP = 7.5  # pixels a frame at 32 x 32: 2.5 times the fastest shape
STANDING = 0.25  # share of the asked speed below which a clip goes nowhere
WALL = 3.0  # pixels at 32 x 32: a turn this near to a wall is a bounce


@dataclasses.dataclass
class Asked:
  """What prompts ask of each shape: [n, shapes]; -1 or nan where they do not say."""

  colour: np.ndarray
  shape: np.ndarray
  direction: np.ndarray  # unit vectors [n, shapes, 2]
  speed: np.ndarray  # pixels per frame
  background: list[str | None]


def measure(
  videos, prompts: Sequence[str], world: WorldConfig, train_frames: int | None = None
) -> dict:
  """Measures videos [n, f, H, W, 3] (uint8, or float in [-1, 1]) against their prompts.

  Args:
    videos: one video per prompt, all of one length f >= 5.
    prompts: captions in the world's words; what a prompt does not name is not judged.
    world: the world that the videos imitate: size and number of shapes.
    train_frames: pixel frames of a training clip: the direction is measured over these. Default:
    world.frames.

  Returns:
    JSON-serialisable: per metric {"total": number, "fifths": [5 numbers]}, None where nothing could
    be judged:
      recognised, colour, shape: share of judged frames that show it and show it right;
      background: share of frames that are nearest to the asked texture;
      hidden: share of frames in which a shape is hidden by more than half;
      motion: mean pixels between consecutive frames, without jumps;
      motion_ratio: motion over what a true clip would move;
      jumps: share of steps longer than 6 px (at 32 x 32);
      error: MSE to the nearest true rendering on the [-1, 1] scale.
    direction: {"total": share of clips whose displacement, up to the first turn at a wall, is
    within 45 degrees of the caption's; standing still is wrong}. error_last_over_first: fifths of
    `error`. relative_error: quantiles of
    what UNRECOGNISABLE cuts. drift: `drift.measure`. prompts: the totals per video. settings: the
    thresholds.

  Raises UserError for shapes, lengths or counts that do not fit.
  """
  train_frames = train_frames or world.frames
  if len(videos) != len(prompts) or not len(prompts):
    raise UserError(
      f"measure: {len(videos)} videos and {len(prompts)} prompts; give one prompt per video"
    )
  asked = read_prompts(prompts, world)
  track = _tracks(fit_videos(videos, asked.background, world), asked, world)
  values = _per_frame(track, asked, train_frames, world)
  values["background"] = _background_right(videos, asked, world)
  headed = _directions(track, asked, train_frames, world)
  result = _summary(values, headed)
  result["relative_error"] = _quantiles(track.relative[track.visible >= HIDDEN])
  result["drift"] = drift.measure(videos)
  result["prompts"] = [
    {
      "prompt": prompt,
      **_row(
        _summary({name: array[i : i + 1] for name, array in values.items()}, headed[i : i + 1])
      ),
    }
    for i, prompt in enumerate(prompts)
  ]
  result["settings"] = {
    "videos": len(prompts),
    "frames": int(track.error.shape[1]),
    "train_frames": train_frames,
    "unrecognisable": UNRECOGNISABLE,
    "hidden": HIDDEN,
    "jump": JUMP * world.scale,
  }
  return result


def data_reference(
  world: WorldConfig,
  codec_roundtrip: Callable[[np.ndarray], np.ndarray] | None = None,
  *,
  clips: int = 32,
  frames: int | None = None,
  split: str = "held_out",
  seed: int = 0,
) -> dict:
  """`measure` of true clips of a split: what a perfect model scores, and with a codec what the
  codec costs.

  `codec_roundtrip` maps float32 videos [n, f, H, W, 3] in [-1, 1] to their decoded latents.
  `frames` defaults to four training lengths. Its "relative_error" says how far UNRECOGNISABLE lies
  from what true clips reach.
  """
  rng = np.random.default_rng(seed)
  scenes = [shapes_world.sample_scene(rng, world, split) for _ in range(clips)]
  states = [shapes_world.simulate(scene, frames or 4 * world.frames) for scene in scenes]
  videos = np.stack(
    [
      shapes_world.render(state, shapes_world.background_image(scene.background, world), world)
      for scene, state in zip(scenes, states, strict=True)
    ]
  )
  if codec_roundtrip is not None:
    videos = np.asarray(codec_roundtrip(videos.astype(np.float32) / 127.5 - 1))
  return measure(videos, [shapes_world.caption(scene) for scene in scenes], world)


def read_prompts(prompts: Sequence[str], world: WorldConfig) -> Asked:
  """Numbers for words: see `Asked`. Words that the world does not know ask for nothing."""
  shape = (len(prompts), world.shapes_per_clip)
  asked = Asked(
    np.full(shape, -1), np.full(shape, -1), np.full((*shape, 2), np.nan), np.full(shape, np.nan), []
  )
  for i, prompt in enumerate(prompts):
    parsed = shapes_world.parse_caption(prompt)
    plain = "plain" if world.difficulty == "plain" else None
    asked.background.append((parsed.background if parsed else None) or plain)
    for k, said in enumerate(parsed.shapes[: world.shapes_per_clip] if parsed else ()):
      asked.colour[i, k] = list(COLOURS).index(said.colour) if said.colour else -1
      asked.shape[i, k] = SHAPES.index(said.shape) if said.shape else -1
      if said.direction:
        asked.direction[i, k] = DIRECTIONS[said.direction]
        asked.speed[i, k] = world.speed(said.speed)
  return asked


def expected_motion(speed, world: WorldConfig):
  """Mean pixels per frame of a true clip: the speed, less what steps lose that end beyond a wall
  and come back.

  A step of length v meets the wall in v / room of all cases, and then covers v / 2 on average.
  """
  return speed * (1 - speed / (2 * (world.size - 2 * world.radius)))


# Which fitted shape is which asked one


def _tracks(fit: Fit, asked: Asked, world: WorldConfig) -> Fit:
  """Reorders the shapes of every frame from back-to-front to the prompt's order."""
  if world.shapes_per_clip == 1:
    return fit
  swap = np.zeros(fit.error.shape, bool)
  last = np.full((len(fit.error), 2, 2), np.nan)
  for i in range(fit.error.shape[1]):
    cost = [_mismatch(fit, i, order, asked, last, world) for order in ([0, 1], [1, 0])]
    swap[:, i] = cost[1] < cost[0]
    order = np.where(swap[:, i, None], [1, 0], [0, 1])
    seen = (fit.visible[:, i] >= HIDDEN) & (fit.relative[:, i] <= UNRECOGNISABLE)
    here = np.where(seen[..., None], fit.xy[:, i], np.nan)
    here = np.take_along_axis(here, order[..., None], 1)
    last = np.where(np.isnan(here), last, here)
  order = np.where(swap[..., None], [1, 0], [0, 1])
  reordered = {
    name: np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 3)), 2)
    for name, array in vars(fit).items()
    if name != "error"
  }
  return Fit(error=fit.error, **reordered)


def _mismatch(
  fit: Fit, i: int, order: list[int], asked: Asked, last: np.ndarray, world: WorldConfig
) -> np.ndarray:
  """Cost of an order at frame i: colour decides before form, form before the distance to where the
  shape was last.
  """
  colour = ((fit.colour[:, i, order] != asked.colour) & (asked.colour >= 0)).sum(-1)
  shape = ((fit.shape[:, i, order] != asked.shape) & (asked.shape >= 0)).sum(-1)
  distance = np.nan_to_num(np.linalg.norm(fit.xy[:, i, order] - last, axis=-1)).sum(-1)
  return 16.0 * colour + 4.0 * shape + distance / world.size


# Numbers per frame and shape, nan where not judged


def _per_frame(
  track: Fit, asked: Asked, train_frames: int, world: WorldConfig
) -> dict[str, np.ndarray]:
  hidden = track.visible < HIDDEN
  shown = (track.relative <= UNRECOGNISABLE) & ~hidden
  judged = ~hidden | _missing(hidden, train_frames)

  def share(right, known=True):
    return np.where(judged & known, shown & right, np.nan)

  steps = np.linalg.norm(np.diff(track.xy, axis=1), axis=-1)
  steps = np.concatenate([np.full_like(steps[:, :1], np.nan), steps], 1)
  steps[:, 1:][~(shown[:, 1:] & shown[:, :-1])] = np.nan
  jump = np.where(np.isnan(steps), np.nan, steps > JUMP * world.scale)
  motion = np.where(jump == 1, np.nan, steps)
  expected = np.broadcast_to(expected_motion(asked.speed, world)[:, None], motion.shape)
  return {
    "recognised": share(True),
    "colour": share(track.colour == asked.colour[:, None], asked.colour[:, None] >= 0),
    "shape": share(track.shape == asked.shape[:, None], asked.shape[:, None] >= 0),
    "hidden": hidden.astype(float),
    "motion": motion,
    "expected_motion": np.where(np.isnan(motion), np.nan, expected),
    "jumps": jump,
    "error": track.error,
  }


def _missing(hidden: np.ndarray, longest: int) -> np.ndarray:
  """Frames of runs of True along axis 1 of [n, f, shapes] that are longer than `longest`."""
  missing = np.zeros_like(hidden)
  for i, k in np.ndindex(hidden.shape[0], hidden.shape[2]):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden[i, :, k], [0]])))
    for start, end in edges.reshape(-1, 2):
      missing[i, start:end, k] = end - start > longest
  return missing


def _background_right(videos, asked: Asked, world: WorldConfig) -> np.ndarray:
  nearest = nearest_background(videos, world).astype(float)
  wanted = [np.nan if name is None else BACKGROUNDS.index(name) for name in asked.background]
  wanted = np.asarray(wanted)[:, None]
  return np.where(np.isnan(wanted), np.nan, nearest == wanted)


def _directions(track: Fit, asked: Asked, train_frames: int, world: WorldConfig) -> np.ndarray:
  """[n, shapes]: 1 where a clip sets out as its caption says, 0 where not, nan where nobody could
  say.
  """
  right = np.full(asked.speed.shape, np.nan)
  hidden = track.visible < HIDDEN
  missing = _missing(hidden, train_frames)
  recognised = track.relative <= UNRECOGNISABLE
  for i, k in np.argwhere(~np.isnan(asked.speed)):
    open_to_view = ~hidden[i, :train_frames, k]
    if 2 * open_to_view.sum() < len(open_to_view) and not missing[i, :train_frames, k].any():
      continue
    frames = np.flatnonzero(open_to_view & recognised[i, :train_frames, k])
    if len(frames) < 2 or 2 * len(frames) < open_to_view.sum():
      right[i, k] = 0
      continue
    path, frames = _before_the_wall(track.xy[i, frames, k], frames, world)
    move, elapsed = path[-1] - path[0], frames[-1] - frames[0]
    along, length = move @ asked.direction[i, k], np.linalg.norm(move)
    right[i, k] = along >= length * np.sqrt(0.5) and length >= STANDING * asked.speed[i, k] * max(
      elapsed, shapes_world.FREE_FRAMES
    )
  return right


def _before_the_wall(
  path: np.ndarray, frames: np.ndarray, world: WorldConfig
) -> tuple[np.ndarray, np.ndarray]:
  """A path [f, 2] up to its first turn near a wall, on the axis along which it moves most."""
  steps = np.diff(path, axis=0)
  axis = int(np.abs(steps).sum(0).argmax()) if len(steps) else 0
  along, least = steps[:, axis], 0.25 * world.scale
  for i in range(1, len(steps)):
    low, high = path[i, axis] - world.radius, world.size - world.radius - path[i, axis]
    wall = -1 if low < high else 1
    # what is left of a step that ends where it began, beyond the wall
    short = abs(along[i]) <= least and i + 1 < len(steps)
    bounced = along[i - 1] * wall > least and along[i + short] * wall < -least
    if bounced and min(low, high) <= WALL * world.scale:
      return path[: i + 1], frames[: i + 1]
  return path, frames


# Sums


def _summary(values: dict[str, np.ndarray], headed: np.ndarray) -> dict:
  result = {name: _totals(array) for name, array in values.items()}
  expected = result.pop("expected_motion")
  motion = result["motion"]
  result["motion_ratio"] = {
    "total": _ratio(motion["total"], expected["total"]),
    "fifths": [_ratio(a, b) for a, b in zip(motion["fifths"], expected["fifths"], strict=True)],
  }
  result["direction"] = {"total": _mean(headed)}
  error = result["error"]["fifths"]
  result["error_last_over_first"] = _ratio(error[-1], error[0])
  return result


def _totals(values: np.ndarray) -> dict:
  """Mean over [n, f, ...], nan left out: in total and per fifth of the frames."""
  return {
    "total": _mean(values),
    "fifths": [_mean(values[:, part]) for part in drift.segments(values.shape[1])],
  }


def _row(summary: dict) -> dict:
  return {
    name: value["total"] if isinstance(value, dict) else value for name, value in summary.items()
  }


def _mean(values: np.ndarray) -> float | None:
  kept = values[~np.isnan(values)]
  return float(kept.mean()) if kept.size else None


def _quantiles(values: np.ndarray) -> dict:
  return {
    f"q{q}": float(np.percentile(values, q)) if values.size else None for q in (50, 90, 99, 100)
  }


def _ratio(a: float | None, b: float | None) -> float | None:
  return a / b if a is not None and b else None
