"""Prompt following, motion and error of videos of the shapes world, per fifth of the video.

Every frame is compared with its nearest true rendering (`shapes_fit`). A shape counts as recognised
if that rendering explains it: squared error at most UNRECOGNISABLE of the squared difference that
the shape makes to the image. An empty frame scores 1 there, a red shape faded by 50 % 0.25, noise
far more than 1; true clips stay under 0.001, and under 0.1 when blurred by a pixel on the plain
world (evaluate measures it, also through a codec). An unrecognised shape counts as wrong in
colour and in form.

A shape that another, or the screen, hides by more than 50 % is not judged in those frames; one
that stays hidden for longer than a training clip (behind the screen: than half as long again as a
true one) is missing, and counts as wrong. Whether a shape comes back from behind the screen as it
was is measured in `shapes_passage`.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.evaluation import drift, shapes_passage
from hiar_jax.evaluation.shapes_direction import Path, heads
from hiar_jax.evaluation.shapes_fit import Fit, fit_videos, nearest_background
from hiar_jax.evaluation.shapes_passage import Passage

UNRECOGNISABLE = 0.5  # share of the shape's own squared contrast
HIDDEN = 0.5  # visible share below which a shape is not judged
BEHIND = 1.5  # times as long as a true shape behind the screen: longer is missing
JUMP = 7.5  # pixels a frame at 32 x 32: 2.5 times the fastest shape


@dataclasses.dataclass
class PromptContent:
  """The content of n prompts; -1, nan or None for what a prompt does not name."""

  colour: np.ndarray  # int [n, shapes], index into COLOURS
  shape: np.ndarray  # int [n, shapes], index into SHAPES
  direction: np.ndarray  # unit vectors [n, shapes, 2]
  speed: np.ndarray  # [n, shapes], pixels per frame
  background: list[str | None]  # n names


@dataclasses.dataclass
class Judged:
  """n videos, frame by frame; nan where nothing could be judged.

  values: {metric: [n, f] or [n, f, shapes]}. headed: [n, shapes], whether a shape first moves as
  its caption says. drift: {metric: [n, f]} of `drift.METRICS`. relative: `Fit.relative` of the
  shapes that are judged, [any]. passages: one a video, in a world with a screen; else None.
  """

  prompts: list[str]
  values: dict[str, np.ndarray]
  headed: np.ndarray
  drift: dict[str, np.ndarray]
  relative: np.ndarray
  passages: list[Passage] | None
  hidden: int  # of the world
  settings: dict


def measure(
  videos, prompts: Sequence[str], world: WorldConfig, train_frames: int | None = None
) -> dict:
  """Measures videos [n, f, H, W, 3] (uint8, or float in [-1, 1]) against their prompts.

  The arguments are those of `judge`.

  Returns:
    JSON-serialisable: per metric {"total": number, "fifths": [5 numbers]}, None where nothing could
    be judged:
      recognised, colour, shape: share of judged frames that show it and show it right;
      background: share of frames that are nearest to the prompt's texture;
      hidden: share of frames in which a shape is hidden by more than 50 %;
      motion: mean pixels between consecutive frames, without jumps;
      motion_ratio: motion over that of a true clip;
      jumps: share of steps longer than JUMP;
      error: MSE to the nearest true rendering on the [-1, 1] scale.
    direction: {"total": share of clips whose displacement before the first wall is within 45
      degrees of the caption's; standing still is wrong}.
    error_last_over_first: ratio of the fifths of `error`.
    relative_error: quantiles of `Fit.relative`, which UNRECOGNISABLE is a threshold of.
    drift: `drift.measure`.
    passage: `shapes_passage.summarise`, of a world with a screen alone.
    prompts: the totals per video.
    settings: the thresholds.

  Raises:
    UserError: shapes, lengths or counts that do not fit.
  """
  judged = judge(videos, prompts, world, train_frames)
  result = _summary(judged.values, judged.headed)
  result["relative_error"] = relative_error(judged.relative)
  result["drift"] = {name: drift.trend(values) for name, values in judged.drift.items()}
  if judged.passages is not None:
    result["passage"] = shapes_passage.summarise(judged.passages, judged.hidden)
  result["prompts"] = []
  for i, prompt in enumerate(prompts):
    each = {name: array[i : i + 1] for name, array in judged.values.items()}
    own = _summary(each, judged.headed[i : i + 1])
    totals = {
      name: value["total"] if isinstance(value, dict) else value for name, value in own.items()
    }
    result["prompts"].append({"prompt": prompt, **totals})
  result["settings"] = judged.settings
  return result


def judge(
  videos, prompts: Sequence[str], world: WorldConfig, train_frames: int | None = None
) -> Judged:
  """Judges videos [n, f, H, W, 3] (uint8, or float in [-1, 1]) frame by frame.

  Args:
    videos: one video per prompt, all of one length f >= 5.
    prompts: captions in the world's words; what a prompt does not name is not judged.
    world: the world that the videos imitate: size and number of shapes.
    train_frames: pixel frames of a training clip: the direction is measured over these at most.
      Default: world.frames.

  Raises:
    UserError: shapes, lengths or counts that do not fit.
  """
  train_frames = train_frames or world.frames
  if len(videos) != len(prompts) or not len(prompts):
    raise UserError(
      f"measure: {len(videos)} videos and {len(prompts)} prompts; give one prompt per video"
    )
  content = read_prompts(prompts, world)
  track = _tracks(fit_videos(videos, content.background, world), content, world)
  values = _per_frame(track, content, train_frames, world)
  wanted = [np.nan if name is None else BACKGROUNDS.index(name) for name in content.background]
  wanted = np.asarray(wanted)[:, None]
  right = nearest_background(videos, world).astype(float) == wanted
  values["background"] = np.where(np.isnan(wanted), np.nan, right)
  passages = None
  if world.hidden:
    seen = (track.visible >= HIDDEN) & (track.relative <= UNRECOGNISABLE)
    only = (array[:, :, 0] for array in (track.colour, track.xy, seen))  # of the only shape
    passages = [
      shapes_passage.find_passage(*video, world.size) for video in zip(*only, strict=True)
    ]
  return Judged(
    prompts=list(prompts),
    values=values,
    headed=_directions(track, content, train_frames, world),
    drift=drift.per_frame(videos),
    relative=track.relative[track.visible >= HIDDEN],
    passages=passages,
    hidden=world.hidden,
    settings={
      "videos": len(prompts),
      "frames": int(track.error.shape[1]),
      "train_frames": train_frames,
      "unrecognisable": UNRECOGNISABLE,
      "hidden": HIDDEN,
      "jump": JUMP * world.scale * world.pace,
    },
  )


def relative_error(relative: np.ndarray) -> dict[str, float | None]:
  """Returns quantiles of `Fit.relative`, which UNRECOGNISABLE is a threshold of."""
  return {
    f"q{q}": float(np.percentile(relative, q)) if relative.size else None for q in (50, 90, 99, 100)
  }


def true_clips(
  world: WorldConfig,
  *,
  clips: int = 32,
  frames: int | None = None,
  split: str = "held_out",
  seed: int = 0,
) -> tuple[np.ndarray, list[str]]:
  """Returns (uint8 [clips, frames, H, W, 3], captions) of a split. frames: default four training
  lengths.
  """
  rng = np.random.default_rng(seed)
  scenes = [shapes_world.sample_scene(rng, world, split) for _ in range(clips)]
  videos = []
  for scene in scenes:
    states = shapes_world.simulate(scene, frames or 4 * world.frames)
    background = shapes_world.background_image(scene.background, world)
    videos.append(shapes_world.render(states, background, world))
  return np.stack(videos), [shapes_world.caption(scene) for scene in scenes]


def read_prompts(prompts: Sequence[str], world: WorldConfig) -> PromptContent:
  """Parses prompts into arrays; words outside of the world are ignored."""
  shape = (len(prompts), world.shapes_per_clip)
  content = PromptContent(
    np.full(shape, -1), np.full(shape, -1), np.full((*shape, 2), np.nan), np.full(shape, np.nan), []
  )
  for i, prompt in enumerate(prompts):
    shapes, background = shapes_world.parse_caption(prompt)
    # Captions of the plain world do not mention its only background.
    default = "plain" if world.difficulty == "plain" else None
    content.background.append(background or default)
    for k, named in enumerate(shapes[: world.shapes_per_clip]):
      content.colour[i, k] = list(COLOURS).index(named.colour) if named.colour else -1
      content.shape[i, k] = SHAPES.index(named.shape) if named.shape else -1
      if named.direction:
        content.direction[i, k] = DIRECTIONS[named.direction]
        content.speed[i, k] = world.speed(named.speed)
  return content


def expected_motion(speed, world: WorldConfig):
  """Returns the mean displacement of a true clip, pixels per frame: the speed, less the loss of the
  steps that bounce.

  A step of length v meets a wall with probability v / room, room = size - 2 radius, and its
  displacement is then v / 2 on average. Of a path that a screen hides in part, only the steps in
  sight count, so its room is less by the screen.
  """
  low, high = world.screen or (0, 0)
  return speed * (1 - speed / (2 * (world.size - 2 * world.radius - (high - low))))


# Assignment of fitted shapes to those of the prompt


def _tracks(fit: Fit, content: PromptContent, world: WorldConfig) -> Fit:
  """Reorders the shapes of every frame from back-to-front to the prompt's order."""
  if world.shapes_per_clip == 1:
    return fit
  swap = np.zeros(fit.error.shape, bool)  # [n, f]
  last = np.full((len(fit.error), 2, 2), np.nan)  # last seen centres, [n, shapes, 2]
  # Frame by frame, for the cost depends on the order of the frames before.
  for i in range(fit.error.shape[1]):
    cost = [_mismatch(fit, i, order, content, last, world) for order in ([0, 1], [1, 0])]
    swap[:, i] = cost[1] < cost[0]
    order = np.where(swap[:, i, None], [1, 0], [0, 1])
    seen = (fit.visible[:, i] >= HIDDEN) & (fit.relative[:, i] <= UNRECOGNISABLE)
    centres = np.where(seen[..., None], fit.xy[:, i], np.nan)
    centres = np.take_along_axis(centres, order[..., None], 1)
    last = np.where(np.isnan(centres), last, centres)
  order = np.where(swap[..., None], [1, 0], [0, 1])  # [n, f, shapes]
  reordered = {
    name: np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 3)), 2)
    for name, array in vars(fit).items()
    if name != "error"  # of the frame, not of a shape
  }
  return Fit(error=fit.error, **reordered)


def _mismatch(
  fit: Fit, i: int, order: list[int], content: PromptContent, last: np.ndarray, world: WorldConfig
) -> np.ndarray:
  """Returns the cost of an order of the shapes at frame i, [n]: colour decides before form, form
  before the distance to the last seen position.
  """
  colour = ((fit.colour[:, i, order] != content.colour) & (content.colour >= 0)).sum(-1)
  shape = ((fit.shape[:, i, order] != content.shape) & (content.shape >= 0)).sum(-1)
  distance = np.nan_to_num(np.linalg.norm(fit.xy[:, i, order] - last, axis=-1)).sum(-1)
  # The distances of two shapes sum to less than 2 sqrt(2) sizes: below the weight of one form,
  # and two wrong forms (8) weigh less than one wrong colour.
  return 16.0 * colour + 4.0 * shape + distance / world.size


# Measures per frame and shape, nan if not judged


def _per_frame(
  track: Fit, content: PromptContent, train_frames: int, world: WorldConfig
) -> dict[str, np.ndarray]:
  """Returns arrays [n, f, shapes], "error" [n, f]; nan if not judged."""
  hidden = track.visible < HIDDEN
  shown = (track.relative <= UNRECOGNISABLE) & ~hidden
  judged = ~hidden | _missing(hidden, train_frames, world)

  def share(right, known=True):
    return np.where(judged & known, shown & right, np.nan)

  # Displacement from the frame before; measured only if the shape is recognised in both.
  steps = np.linalg.norm(np.diff(track.xy, axis=1), axis=-1)
  steps = np.concatenate([np.full_like(steps[:, :1], np.nan), steps], 1)
  steps[:, 1:][~(shown[:, 1:] & shown[:, :-1])] = np.nan
  jump = np.where(np.isnan(steps), np.nan, steps > JUMP * world.scale * world.pace)
  motion = np.where(jump == 1, np.nan, steps)
  # Over the same frames as the motion, so that the ratio of the sums is fair.
  expected = np.broadcast_to(expected_motion(content.speed, world)[:, None], motion.shape)
  return {
    "recognised": share(True),
    "colour": share(track.colour == content.colour[:, None], content.colour[:, None] >= 0),
    "shape": share(track.shape == content.shape[:, None], content.shape[:, None] >= 0),
    "hidden": hidden.astype(float),
    "motion": motion,
    "expected_motion": np.where(np.isnan(motion), np.nan, expected),
    "jumps": jump,
    "error": track.error,
  }


def _missing(hidden: np.ndarray, train_frames: int, world: WorldConfig) -> np.ndarray:
  """Marks the runs of True along axis 1 of [n, f, shapes] that are longer than a shape of the world
  is hidden.
  """
  longest = train_frames
  if world.screen is not None:
    low, high = world.screen  # half of a shape is in sight when its centre is at the edge
    longest = BEHIND * (high - low) / world.speed("")
  missing = np.zeros_like(hidden)
  for i, k in np.ndindex(hidden.shape[0], hidden.shape[2]):
    # Starts and ends of runs alternate in the differences of the padded series.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden[i, :, k], [0]])))
    for start, end in edges.reshape(-1, 2):
      missing[i, start:end, k] = end - start > longest
  return missing


def _directions(
  track: Fit, content: PromptContent, train_frames: int, world: WorldConfig
) -> np.ndarray:
  """Returns [n, shapes]: 1 if a shape first moves as its caption says, 0 if not, nan if the caption
  names no direction or the shape is hidden too long to measure it.
  """
  right = np.full(content.speed.shape, np.nan)
  hidden = track.visible < HIDDEN
  missing = _missing(hidden, train_frames, world)
  recognised = track.relative <= UNRECOGNISABLE
  for i, k in np.argwhere(~np.isnan(content.speed)):
    first = np.s_[i, :train_frames, k]
    path = Path(track.xy[first], ~hidden[first], recognised[first], missing[first])
    right[i, k] = heads(path, content.direction[i, k], content.speed[i, k], world)
  return right


# Means


def _summary(values: dict[str, np.ndarray], headed: np.ndarray) -> dict:
  """Returns means of arrays [n, f, ...], nan left out: in total and per fifth of the frames."""
  result = {}
  for name, array in values.items():
    fifths = [drift.mean(array[:, part]) for part in drift.segments(array.shape[1])]
    result[name] = {"total": drift.mean(array), "fifths": fifths}
  expected = result.pop("expected_motion")
  motion = result["motion"]
  result["motion_ratio"] = {
    "total": _ratio(motion["total"], expected["total"]),
    "fifths": [_ratio(a, b) for a, b in zip(motion["fifths"], expected["fifths"], strict=True)],
  }
  result["direction"] = {"total": drift.mean(headed)}
  error = result["error"]["fifths"]
  result["error_last_over_first"] = _ratio(error[-1], error[0])
  return result


def _ratio(a: float | None, b: float | None) -> float | None:
  return a / b if a is not None and b else None
