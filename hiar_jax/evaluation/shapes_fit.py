"""The nearest true rendering of the shapes world: what a drawn frame shows, and how far it is from
anything exact.

With the picture underneath B, a shape's coverage a, its colour C and the share w of it that nothing
hides, a rendering is base + w a (C - B). For a frame x and D = x - base the squared error is

    |x - render|^2 = |D|^2 - 2 sum w a D.(C - B) + sum w^2 a^2 |C - B|^2                 (1)

where all that depends on place and form is a and a^2. So one matrix product of a bank of coverages
(every form on a grid of places) with a few columns per frame scores every form, place and colour at
once; Gauss-Newton on the two coordinates of the place then goes below the pixel. Two shapes are
fitted by coordinate descent: each with the other held, in both orders, and from the solutions of
the neighbouring frames, which see apart what this frame shows one behind the other.
"""

import dataclasses
import functools

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, COLOURS, SHAPES, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float

RGB = np.asarray(list(COLOURS.values()), np.float32)  # [colours, 3], in [0, 1]
_CHUNK = 192  # frames fitted at once: bounds memory at about 100 MB
# of coordinate descent over two shapes: a second one changes errors by less than 3e-4, at twice the
# time
_SWEEPS = 1


@dataclasses.dataclass
class Fit:
  """Nearest renderings of frames; leading axes [...] are those of the frames. Shapes are ordered
  back to front.

  colour:   int [..., shapes], index into COLOURS.
  shape:    int [..., shapes], index into SHAPES.
  xy:       float [..., shapes, 2], centres in pixels.
  error:    float [...], MSE to the frame on the [-1, 1] scale.
  relative: float [..., shapes], the squared error outside the other shape's visible part, over the
            squared difference that this shape makes to the picture: 0 exact, 1 as if the shape
            were not there.
  visible:  float [..., shapes], the share of each shape that no other hides.
  """

  colour: np.ndarray
  shape: np.ndarray
  xy: np.ndarray
  error: np.ndarray
  relative: np.ndarray
  visible: np.ndarray

  def reshape(self, *leading: int) -> "Fit":
    depth = self.error.ndim
    parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return Fit(
      **{name: value.reshape(*leading, *value.shape[depth:]) for name, value in parts.items()}
    )


def fit_videos(videos, backgrounds: list[str | None], config: WorldConfig) -> Fit:
  """Fits videos [n, f, H, W, 3] (uint8, or float in [-1, 1]); leading axes of the result are [n,
  f].

  `backgrounds` names the texture of each video; None means unknown: the one that the video is
  nearest to. Raises UserError for frames of another size than the world's, or for an unknown
  texture.
  """
  x = _unit(videos, config)
  if len(backgrounds) != len(x):
    raise UserError(
      f"fit: {len(x)} videos but {len(backgrounds)} backgrounds; give one (or None) per video"
    )
  nearest = nearest_background(videos, config)
  ids = [
    int(np.bincount(near).argmax()) if name is None else _background_id(name)
    for name, near in zip(backgrounds, nearest, strict=True)
  ]
  pictures = _backgrounds(config)[ids]
  n, f, pixels, _ = x.shape
  x = x.reshape(n * f, pixels, 3)
  under = np.repeat(pictures, f, 0)
  parts = [slice(start, start + _CHUNK) for start in range(0, n * f, _CHUNK)]
  pairs = config.shapes_per_clip == 2
  state = _concatenate(
    [(_fit_pair if pairs else _fit_single)(x[part], under[part], config) for part in parts]
  )
  if pairs:
    state = _ask_neighbours(state, x, under, f, config)
  return _concatenate(
    [_describe(x[part], under[part], state[part], config) for part in parts]
  ).reshape(n, f)


def nearest_background(videos, config: WorldConfig) -> np.ndarray:
  """Which of BACKGROUNDS each frame of videos [n, f, H, W, 3] is nearest to: int [n, f].

  The absolute error of a pixel saturates, so that the shapes, wherever they are, decide nothing.
  """
  x = _unit(videos, config)
  distance = [
    np.minimum(np.abs(x - picture).mean(-1), 0.1).mean(-1) for picture in _backgrounds(config)
  ]
  return np.argmin(distance, 0)


# One shape, the rest of the picture held


@dataclasses.dataclass
class _State:
  """A solution per frame: colour, shape int [F, n], xy [F, n, 2], loss [F]: summed squared error,
  colours in [0, 1].
  """

  colour: np.ndarray
  shape: np.ndarray
  xy: np.ndarray
  loss: np.ndarray

  def __getitem__(self, index) -> "_State":
    return _State(self.colour[index], self.shape[index], self.xy[index], self.loss[index])

  def better(self, other: "_State") -> "_State":
    """Frame by frame, the solution of lower loss."""
    win = other.loss < self.loss
    pairs = (
      (getattr(self, name), getattr(other, name)) for name in ("colour", "shape", "xy", "loss")
    )
    return _State(
      *(np.where(win.reshape(-1, *[1] * (old.ndim - 1)), new, old) for old, new in pairs)
    )


@dataclasses.dataclass
class _Context:
  """What is held while one shape moves: x = base + weight a (C - under).

  Arrays [F, P, 3]; weight [F, P].
  """

  residual: np.ndarray  # x - base
  under: np.ndarray
  weight: np.ndarray
  config: WorldConfig


@dataclasses.dataclass(frozen=True)
class _Bank:
  alpha: np.ndarray  # float32 [shapes * grid, P]
  square: np.ndarray  # its square
  xy: np.ndarray  # [grid, 2]


@functools.lru_cache(maxsize=4)
def _bank(size: int, radius: float) -> _Bank:
  # A pixel apart at 32 x 32: the nearest place of the grid lies within reach of the refinement.
  axis = np.linspace(radius, size - radius, 1 + round((size - 2 * radius) * 5.5 / radius))
  xy = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
  alpha = np.stack([shapes_world.alpha_mask(shape, xy, radius, size) for shape in SHAPES])
  alpha = alpha.reshape(len(SHAPES) * len(xy), size * size).astype(np.float32)
  return _Bank(alpha, alpha**2, xy)


def _fit_one(context: _Context, exclude: np.ndarray | None = None) -> _State:
  """The best form, colour and place of one shape (n = 1) among all, colours `exclude` [F] left
  out.
  """
  scores = _scores(context)
  if exclude is not None:
    scores[np.arange(len(scores)), exclude] = np.inf
  count = len(scores)
  grid = _bank(context.config.size, context.config.radius).xy
  best = None
  for shape in range(len(SHAPES)):
    own = scores[:, :, shape * len(grid) : (shape + 1) * len(grid)].reshape(count, -1)
    colour, place = np.divmod(own.argmin(1), len(grid))
    start = _State(
      colour[:, None], np.full((count, 1), shape), grid[place][:, None], np.zeros(count)
    )
    refined = _refine(context, start)
    best = refined if best is None else best.better(refined)
  return best


def _scores(context: _Context) -> np.ndarray:
  """Equation (1) without |D|^2 for every colour and coverage of the bank: [F, colours, shapes *
  grid].
  """
  bank = _bank(context.config.size, context.config.radius)
  pulled, under, square = (
    context.residual * context.weight[..., None],
    context.under,
    context.weight**2,
  )
  count = len(pulled)
  linear = np.stack([*np.moveaxis(pulled, -1, 0), (pulled * under).sum(-1)], 1)  # [F, 4, P]
  quadratic = np.stack(
    [square, *np.moveaxis(under * square[..., None], -1, 0), (under**2).sum(-1) * square], 1
  )
  linear = (linear.reshape(count * 4, -1) @ bank.alpha.T).reshape(count, 4, -1)
  quadratic = (quadratic.reshape(count * 5, -1) @ bank.square.T).reshape(count, 5, -1)
  gain = RGB @ linear[:, :3] - linear[:, 3:]
  cost = (
    (RGB**2).sum(-1)[:, None] * quadratic[:, :1] - 2 * (RGB @ quadratic[:, 1:4]) + quadratic[:, 4:]
  )
  return cost - 2 * gain


def _refine(context: _Context, state: _State, steps: int = 3) -> _State:
  """Moves one shape per frame (n = 1) to the nearest minimum of (1); its colour and form stay."""
  config, xy = context.config, state.xy[:, 0]
  contrast = RGB[state.colour[:, 0]][:, None] - context.under
  target = context.weight * (context.residual * contrast).sum(-1)
  curve = context.weight**2 * (contrast**2).sum(-1)
  reach = int(np.ceil(config.radius + 2 * config.scale))
  corner = np.floor(xy).astype(int) - reach
  target, curve = (_windows(array, corner, 2 * reach + 1, config.size) for array in (target, curve))
  loss = np.full(len(xy), np.inf)
  for shape in range(len(SHAPES)):
    own = np.flatnonzero(state.shape[:, 0] == shape)
    if own.size:
      xy[own], loss[own] = _descend(
        SHAPES[shape], xy[own], corner[own], target[own], curve[own], steps, config
      )
  loss = loss + (context.residual**2).sum((-2, -1))
  return _State(state.colour, state.shape, xy[:, None], loss)


def _descend(shape, xy, corner, target, curve, steps, config) -> tuple[np.ndarray, np.ndarray]:
  """Gauss-Newton with a short line search on sum(curve a^2 - 2 target a) over the place of one
  form.
  """
  span = target.shape[-1]

  def alpha(places):
    return shapes_world.alpha_mask(shape, places - corner, config.radius, span)

  def value(a):
    return (curve * a * a - 2 * target * a).sum((-2, -1))

  nudge = 0.2 * config.scale
  axes = np.asarray([[1, 0], [-1, 0], [0, 1], [0, -1]])[:, None] * nudge
  best = value(alpha(xy))
  for _ in range(steps):
    right, left, down, up = alpha(xy + axes)
    now = alpha(xy)
    dx, dy = (right - left) / (2 * nudge), (down - up) / (2 * nudge)
    gradient = np.stack([((curve * now - target) * d).sum((-2, -1)) for d in (dx, dy)], -1)
    xx, yy, xy_ = ((curve * p).sum((-2, -1)) for p in (dx * dx, dy * dy, dx * dy))
    floor = 1e-6 + 1e-3 * (xx + yy)  # a hidden shape feels no force: stay
    hessian = np.stack([np.stack([xx + floor, xy_], -1), np.stack([xy_, yy + floor], -1)], -2)
    step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
    length = np.linalg.norm(step, axis=-1, keepdims=True)
    step = step * np.minimum(1, config.scale / np.maximum(length, 1e-9))
    for share in (1.0, 0.3):
      there = np.clip(xy + share * step, config.radius, config.size - config.radius)
      loss = value(alpha(there))
      win = loss < best
      xy, best = np.where(win[:, None], there, xy), np.where(win, loss, best)
      step = np.where(win[:, None], 0, step)
  return xy, best


def _windows(maps: np.ndarray, corner: np.ndarray, span: int, size: int) -> np.ndarray:
  """Squares of `span` pixels of maps [F, P] whose first pixel is `corner` [F, 2] (x, y); zero
  outside the image.
  """
  maps = np.pad(maps.reshape(len(maps), size, size), ((0, 0), (span, span), (span, span)))
  columns, rows = (corner[:, i, None] + span + np.arange(span) for i in (0, 1))
  return maps[np.arange(len(maps))[:, None, None], rows[:, :, None], columns[:, None, :]]


# One or two shapes


def _fit_single(x: np.ndarray, under: np.ndarray, config: WorldConfig) -> _State:
  return _fit_one(_Context(x - under, under, np.ones(x.shape[:2], np.float32), config))


def _fit_pair(x: np.ndarray, under: np.ndarray, config: WorldConfig) -> _State:
  """Greedy first shape, then coordinate descent with the second in front and with the second
  behind.
  """
  first = _fit_single(x, under, config)
  best = None
  for place in (0, 1):
    pair = _State(
      *(np.repeat(getattr(first, k), 2, 1) for k in ("colour", "shape", "xy")), first.loss
    )
    for _ in range(_SWEEPS):
      for index in (1 - place, place):
        pair = _refit(x, under, pair, index, config)
    best = pair if best is None else best.better(pair)
  return best


def _refit(x, under, pair: _State, index: int, config: WorldConfig, local: bool = False) -> _State:
  """Fits shape `index` of each pair anew (or, `local`, only moves it), the other held; two shapes
  have two colours.
  """
  context = _holding(x, under, pair, 1 - index, config)
  if local:
    found = _refine(
      context,
      _State(pair.colour[:, [index]], pair.shape[:, [index]], pair.xy[:, [index]], pair.loss),
    )
  else:
    found = _fit_one(context, exclude=pair.colour[:, 1 - index])
  parts = []
  for name in ("colour", "shape", "xy"):
    held = getattr(pair, name)[:, [1 - index]]
    parts.append(
      np.concatenate(
        [getattr(found, name), held] if index == 0 else [held, getattr(found, name)], 1
      )
    )
  return _State(*parts, found.loss)


def _holding(x, under, pair: _State, held: int, config: WorldConfig) -> _Context:
  """The context in which the other shape moves while shape `held` (0 back, 1 front) stays."""
  alpha = _alpha(pair.shape[:, held], pair.xy[:, held], config)[..., None]
  covered = under + alpha * (RGB[pair.colour[:, held]][:, None] - under)
  if held == 0:
    return _Context(x - covered, covered, np.ones(x.shape[:2], np.float32), config)
  return _Context(x - covered, under, 1 - alpha[..., 0], config)


def _ask_neighbours(
  state: _State, x, under, frames: int, config: WorldConfig, rounds: int = 1
) -> _State:
  """Moves each frame's two places to fit together, then tries the solutions of the frames before
  and after it.
  """
  index = np.arange(len(x))
  place = index % frames
  for shift in [0, 1, -1] * rounds:
    source = np.where((place - shift >= 0) & (place - shift < frames), index - shift, index)
    trials = []
    for start in range(0, len(x), _CHUNK):
      part = slice(start, start + _CHUNK)
      trial = state[source[part]]
      for moved in (1, 0, 1, 0):
        trial = _refit(x[part], under[part], trial, moved, config, local=True)
      trials.append(trial)
    state = state.better(_concatenate(trials))
  return state


def _describe(x: np.ndarray, under: np.ndarray, state: _State, config: WorldConfig) -> Fit:
  alphas = [_alpha(state.shape[:, i], state.xy[:, i], config) for i in range(state.shape.shape[1])]
  layers = [under]
  for i, alpha in enumerate(alphas):
    layers.append(layers[-1] + alpha[..., None] * (RGB[state.colour[:, i]][:, None] - layers[-1]))
  visible = [alphas[0] * (1 - alphas[1]), alphas[1]] if len(alphas) == 2 else alphas
  squared = ((x - layers[-1]) ** 2).sum(-1)
  relative = []
  for i in range(len(alphas)):
    contrast = ((RGB[state.colour[:, i]][:, None] - layers[i]) ** 2).sum(-1)
    elsewhere = 1 - sum((v for j, v in enumerate(visible) if j != i), start=np.zeros_like(squared))
    relative.append(
      (squared * elsewhere).sum(-1) / np.maximum((visible[i] ** 2 * contrast).sum(-1), 1e-6)
    )
  shares = [v.sum(-1) / a.sum(-1) for v, a in zip(visible, alphas, strict=True)]
  error = 4 / 3 * squared.mean(-1)  # a mean over channels, and twice the distance between -1 and 1
  return Fit(
    state.colour, state.shape, state.xy, error, np.stack(relative, -1), np.stack(shares, -1)
  )


# Pictures


def _alpha(shape: np.ndarray, xy: np.ndarray, config: WorldConfig) -> np.ndarray:
  """Coverage [F, P] of a form and a place per frame."""
  alpha = np.zeros((len(shape), config.size**2), np.float32)
  for i, name in enumerate(SHAPES):
    own = np.flatnonzero(shape == i)
    if own.size:
      alpha[own] = shapes_world.alpha_mask(name, xy[own], config.radius, config.size).reshape(
        own.size, -1
      )
  return alpha


def _backgrounds(config: WorldConfig) -> np.ndarray:
  """All textures: float32 [backgrounds, P, 3] in [0, 1]."""
  return np.stack(
    [shapes_world.background_image(name, config).reshape(-1, 3) for name in BACKGROUNDS]
  )


def _background_id(name: str) -> int:
  if name not in BACKGROUNDS:
    raise UserError(f"background {name!r} is unknown; choose one of {', '.join(BACKGROUNDS)}")
  return BACKGROUNDS.index(name)


def _unit(videos, config: WorldConfig) -> np.ndarray:
  videos = np.asarray(videos)
  if videos.ndim != 5 or videos.shape[2:] != (config.size, config.size, 3):
    raise UserError(
      f"videos have shape {videos.shape}; expected [n, f, {config.size}, {config.size}, 3], "
      "the world's size: measure with the world that the videos were made in"
    )
  n, f = videos.shape[:2]
  return (to_float(videos).reshape(n, f, -1, 3) + 1) / 2


def _concatenate(parts: list):
  kind = type(parts[0])
  names = [field.name for field in dataclasses.fields(kind)]
  return kind(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
