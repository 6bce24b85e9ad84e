"""The nearest true rendering of frames of the shapes world, and the distance to it.

With the image underneath B, a shape's coverage a, its colour C and the share w of it that nothing
hides, a rendering is base + w a (C - B). For a frame x and D = x - base the squared error is

    |x - render|^2 = |D|^2 - 2 sum w a D.(C - B) + sum w^2 a^2 |C - B|^2                 (1)

in which only a and a^2 depend on position and form. One matrix product of a bank of coverages
(every form on a grid of positions) with a few columns per frame therefore scores every form,
position and colour at once; Gauss-Newton on the two coordinates then refines the position below
the pixel. Two shapes are fitted by coordinate descent: each with the other fixed, in both depth
orders, and again from the solutions of the neighbouring frames, where shapes that overlap in this
frame may lie apart. Where a screen hides the one shape, w is 0.

Axes, beside those of types.py: F frames of all videos, P = H W pixels of a frame.
"""

import dataclasses
import functools

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, COLOURS, SHAPES, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.evaluation import shapes_pixels

RGB = np.asarray(list(COLOURS.values()), np.float32)  # [colours, 3], in [0, 1]
_CHUNK = 192  # frames fitted at once: bounds memory at about 100 MB
# Sweeps of coordinate descent over two shapes: a second one changes errors by less than 3e-4, at
# twice the time.
_SWEEPS = 1


@dataclasses.dataclass
class Fit:
  """Nearest renderings of frames, with the leading axes [...] of the frames; shapes back to front.

  relative: the squared error outside the other shape's visible part (and near this shape, where
  shapes are smaller than usual), over the squared difference that this shape makes to the image: 0
  exact, 1 as if the shape were absent.
  """

  colour: np.ndarray  # int [..., shapes], index into COLOURS
  shape: np.ndarray  # int [..., shapes], index into SHAPES
  xy: np.ndarray  # [..., shapes, 2], centres in pixels
  error: np.ndarray  # [...], MSE to the frame on the [-1, 1] scale
  relative: np.ndarray  # [..., shapes]
  visible: np.ndarray  # [..., shapes], share of each shape that nothing hides


def fit_videos(videos, backgrounds: list[str | None], config: WorldConfig) -> Fit:
  """Fits videos [n, f, H, W, 3] (uint8, or float in [-1, 1]); the result's leading axes are [n, f].

  backgrounds: the texture of each video; None: the one that most of its frames are nearest to.

  Raises:
    UserError: frames of another size than the world's, or an unknown texture.
  """
  x = shapes_pixels.unit(videos, config)
  if len(backgrounds) != len(x):
    raise UserError(
      f"fit: {len(x)} videos but {len(backgrounds)} backgrounds; give one (or None) per video"
    )
  for name in backgrounds:
    if name is not None and name not in BACKGROUNDS:
      raise UserError(f"background {name!r} is unknown; choose one of {', '.join(BACKGROUNDS)}")
  ids = [
    int(np.bincount(nearest).argmax()) if name is None else BACKGROUNDS.index(name)
    for name, nearest in zip(backgrounds, nearest_background(videos, config), strict=True)
  ]
  n, f, pixels, _ = x.shape
  x = x.reshape(n * f, pixels, 3)  # frames of all videos are fitted alike
  under = np.repeat(shapes_pixels.backgrounds(config)[ids], f, 0)
  chunks = [slice(start, start + _CHUNK) for start in range(0, n * f, _CHUNK)]
  state = _concatenate([_fit(x[chunk], under[chunk], config) for chunk in chunks])
  if config.shapes_per_clip == 2:
    state = _try_neighbours(state, x, under, f, config)
  found = [_describe(x[chunk], under[chunk], state[chunk], config) for chunk in chunks]
  arrays = vars(_concatenate(found)).items()
  return Fit(**{name: array.reshape(n, f, *array.shape[1:]) for name, array in arrays})


def nearest_background(videos, config: WorldConfig) -> np.ndarray:
  """Returns the nearest of BACKGROUNDS for each frame of videos [n, f, H, W, 3]: int [n, f]."""
  x = shapes_pixels.unit(videos, config)
  # The error of a pixel saturates at 0.1, half the contrast of the textures: pixels of shapes, far
  # from every background, count alike for all of them.
  distance = [
    np.minimum(np.abs(x - image).mean(-1), 0.1).mean(-1)
    for image in shapes_pixels.backgrounds(config)
  ]
  return np.argmin(distance, 0)


# One shape, the rest of the image fixed


@dataclasses.dataclass
class _State:
  """A solution per frame, for n shapes."""

  colour: np.ndarray  # int [F, n]
  shape: np.ndarray  # int [F, n]
  xy: np.ndarray  # [F, n, 2]
  loss: np.ndarray  # [F], squared error summed over pixels and channels, colours in [0, 1]

  def __getitem__(self, index) -> "_State":
    return _State(self.colour[index], self.shape[index], self.xy[index], self.loss[index])

  def better(self, other: "_State") -> "_State":
    """Returns, frame by frame, the solution of lower loss."""
    win = other.loss < self.loss
    chosen = {}
    for name, old in vars(self).items():
      mask = win.reshape(-1, *[1] * (old.ndim - 1))  # [F] against [F, n] or [F, n, 2]
      chosen[name] = np.where(mask, getattr(other, name), old)
    return _State(**chosen)


@dataclasses.dataclass
class _Context:
  """The fixed terms of equation (1) while one shape moves: x = base + weight a (C - under)."""

  residual: np.ndarray  # x - base, [F, P, 3]
  under: np.ndarray  # image under the shape, [F, P, 3]
  weight: np.ndarray  # share of the shape that would be visible, [F, P]
  config: WorldConfig


@functools.lru_cache(maxsize=4)
def _bank(size: int, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the coverages of every form at every position of a grid, float32 [shapes * grid, P],
  their squares, and the positions [grid, 2].
  """
  # Grid points are one pixel apart at 32 x 32 (radius 5.5), near enough for `_refine`, which moves
  # by at most one such pixel a step; two in a room of many small shapes, where time and memory
  # would be four times as large.
  steps = (size - 2 * radius) * 5.5 / radius
  axis = np.linspace(radius, size - radius, 1 + round(steps if steps < 42 else steps / 2))
  xy = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
  alpha = np.stack([shapes_world.alpha_mask(shape, xy, radius, size) for shape in SHAPES])
  alpha = alpha.reshape(len(SHAPES) * len(xy), size * size).astype(np.float32)
  return alpha, alpha**2, xy


def _fit_one(context: _Context, exclude: np.ndarray | None = None) -> _State:
  """Finds the best form, colour and position of one shape (n = 1), except colours `exclude` [F]."""
  scores = _scores(context)
  if exclude is not None:
    scores[np.arange(len(scores)), exclude] = np.inf
  count = len(scores)
  _, _, grid = _bank(context.config.size, context.config.radius)
  best = None
  # The grid decides colour and position, but not the form: forms are close to each other in error,
  # so each is refined before they are compared.
  for shape in range(len(SHAPES)):
    own = scores[:, :, shape * len(grid) : (shape + 1) * len(grid)].reshape(count, -1)
    colour, point = np.divmod(own.argmin(1), len(grid))  # [F, colours * grid], colours outermost
    start = _State(
      colour[:, None], np.full((count, 1), shape), grid[point][:, None], np.zeros(count)
    )
    refined = _refine(context, start)
    best = refined if best is None else best.better(refined)
  return best


def _scores(context: _Context) -> np.ndarray:
  """Returns (1) without |D|^2 for every colour and coverage: [F, colours, shapes * grid]."""
  alpha, alpha_squared, _ = _bank(context.config.size, context.config.radius)
  under = context.under
  pulled = context.residual * context.weight[..., None]  # w D
  square = context.weight**2
  count = len(pulled)
  # Expanded in powers of C, so that the products with the bank hold for all colours:
  # w D.(C - B) = C.(w D) - w D.B;  w^2 |C - B|^2 = w^2 |C|^2 - 2 C.(w^2 B) + w^2 |B|^2
  linear = np.stack([*np.moveaxis(pulled, -1, 0), (pulled * under).sum(-1)], 1)  # [F, 4, P]
  quadratic = np.stack(
    [square, *np.moveaxis(under * square[..., None], -1, 0), (under**2).sum(-1) * square], 1
  )  # [F, 5, P]
  # One matrix product each, [F * 4, P] @ [P, shapes * grid].
  linear = (linear.reshape(count * 4, -1) @ alpha.T).reshape(count, 4, -1)
  quadratic = (quadratic.reshape(count * 5, -1) @ alpha_squared.T).reshape(count, 5, -1)
  gain = RGB @ linear[:, :3] - linear[:, 3:]
  cost = (
    (RGB**2).sum(-1)[:, None] * quadratic[:, :1] - 2 * (RGB @ quadratic[:, 1:4]) + quadratic[:, 4:]
  )
  return cost - 2 * gain


def _refine(context: _Context, state: _State, steps: int = 3) -> _State:
  """Moves one shape per frame (n = 1) to the nearest minimum of (1); its colour and form stay."""
  config, xy = context.config, state.xy[:, 0]
  # (1) is now sum(curve a^2 - 2 target a) + |D|^2, with maps [F, P] that do not move.
  contrast = RGB[state.colour[:, 0]][:, None] - context.under
  target = context.weight * (context.residual * contrast).sum(-1)
  curve = context.weight**2 * (contrast**2).sum(-1)
  # a is 0 outside of a window around the shape, with a margin for its movement.
  reach = int(np.ceil(config.radius + 2 * config.scale * config.shape_size))
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
  """Minimises sum(curve a^2 - 2 target a) over positions xy [m, 2] of one form, by Gauss-Newton.

  curve, target: windows [m, span, span] whose first pixels are `corner` [m, 2] (x, y). Returns
  (positions, values [m]).
  """
  span = target.shape[-1]

  def alpha(positions):
    return shapes_world.alpha_mask(shape, positions - corner, config.radius, span)

  def value(a):
    return (curve * a * a - 2 * target * a).sum((-2, -1))

  # Central differences, for a coverage has kinks where an edge meets a pixel's border.
  pixel = config.scale * config.shape_size  # one of a shape of radius 5.5
  nudge = 0.2 * pixel
  axes = np.asarray([[1, 0], [-1, 0], [0, 1], [0, -1]])[:, None] * nudge
  best = value(alpha(xy))
  for _ in range(steps):
    right, left, down, up = alpha(xy + axes)
    now = alpha(xy)
    dx, dy = (right - left) / (2 * nudge), (down - up) / (2 * nudge)
    gradient = np.stack([((curve * now - target) * d).sum((-2, -1)) for d in (dx, dy)], -1)
    xx, yy, xy_ = ((curve * p).sum((-2, -1)) for p in (dx * dx, dy * dy, dx * dy))
    floor = 1e-6 + 1e-3 * (xx + yy)  # damping; the Hessian of a hidden shape is 0
    hessian = np.stack([np.stack([xx + floor, xy_], -1), np.stack([xy_, yy + floor], -1)], -2)
    step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
    # At most one such pixel a step, within the walls.
    length = np.linalg.norm(step, axis=-1, keepdims=True)
    step = step * np.minimum(1, pixel / np.maximum(length, 1e-9))
    for share in (1.0, 0.3):  # line search: the whole step, else 30 % of it, else none
      moved = np.clip(xy + share * step, config.radius, config.size - config.radius)
      loss = value(alpha(moved))
      win = loss < best
      xy, best = np.where(win[:, None], moved, xy), np.where(win, loss, best)
      step = np.where(win[:, None], 0, step)  # a step that was taken is not tried again
  return xy, best


def _windows(maps: np.ndarray, corner: np.ndarray, span: int, size: int) -> np.ndarray:
  """Cuts windows [F, span, span] with first pixel `corner` [F, 2] (x, y) out of maps [F, P]; zero
  outside the image.
  """
  maps = np.pad(maps.reshape(len(maps), size, size), ((0, 0), (span, span), (span, span)))
  columns, rows = (corner[:, i, None] + span + np.arange(span) for i in (0, 1))
  return maps[np.arange(len(maps))[:, None, None], rows[:, :, None], columns[:, None, :]]


# One or two shapes


def _fit(x: np.ndarray, under: np.ndarray, config: WorldConfig) -> _State:
  """Fits one shape alone, then (if there are two) both by coordinate descent, with the second in
  front and behind.

  Shapes of a state are ordered back to front, so `second` = 0 puts the second shape behind.
  """
  in_sight = np.broadcast_to(shapes_pixels.in_sight(config), x.shape[:2])
  first = _fit_one(_Context(x - under, under, in_sight, config))
  if config.shapes_per_clip == 1:
    return first
  best = None
  for second in (0, 1):
    # Both start as copies of the first shape; the second is fitted before it is read.
    copies = [np.repeat(array, 2, 1) for array in (first.colour, first.shape, first.xy)]
    pair = _State(*copies, first.loss)
    for _ in range(_SWEEPS):
      for index in (1 - second, second):
        pair = _refit(x, under, pair, index, config)
    best = pair if best is None else best.better(pair)
  return best


def _refit(x, under, pair: _State, index: int, config: WorldConfig, local: bool = False) -> _State:
  """Fits shape `index` (0 back, 1 front) of each pair again (`local`: only moves it), the other
  fixed.
  """
  fixed = 1 - index
  alpha = shapes_pixels.coverage(pair.shape[:, fixed], pair.xy[:, fixed], config)[..., None]
  covered = under + alpha * (RGB[pair.colour[:, fixed]][:, None] - under)
  if fixed == 0:
    context = _Context(x - covered, covered, np.ones(x.shape[:2], np.float32), config)
  else:
    # The fixed shape in front hides `alpha` of what changes behind it.
    context = _Context(x - covered, under, 1 - alpha[..., 0], config)
  if local:
    own = (array[:, [index]] for array in (pair.colour, pair.shape, pair.xy))
    found = _refine(context, _State(*own, pair.loss))
  else:  # two shapes of the world have two colours
    found = _fit_one(context, exclude=pair.colour[:, fixed])
  arrays = []
  for name in ("colour", "shape", "xy"):
    both = [getattr(found, name), getattr(pair, name)[:, [fixed]]]
    arrays.append(np.concatenate(both if index == 0 else both[::-1], 1))
  return _State(*arrays, found.loss)


def _try_neighbours(state: _State, x, under, frames: int, config: WorldConfig) -> _State:
  """Refines both positions of each frame together, then from the solutions of the frames before and
  after it.
  """
  index = np.arange(len(x))
  frame = index % frames
  for shift in (0, 1, -1):
    # Neighbours are of the same video: the first and last frame keep their own solution.
    source = np.where((frame - shift >= 0) & (frame - shift < frames), index - shift, index)
    trials = []
    for start in range(0, len(x), _CHUNK):
      chunk = slice(start, start + _CHUNK)
      trial = state[source[chunk]]
      for moved in (1, 0, 1, 0):
        trial = _refit(x[chunk], under[chunk], trial, moved, config, local=True)
      trials.append(trial)
    state = state.better(_concatenate(trials))
  return state


def _describe(x: np.ndarray, under: np.ndarray, state: _State, config: WorldConfig) -> Fit:
  """Renders the solutions of frames x [F, P, 3] and measures them; see `Fit`."""
  whole = [
    shapes_pixels.coverage(state.shape[:, i], state.xy[:, i], config)
    for i in range(state.shape.shape[1])
  ]
  alphas = [alpha * shapes_pixels.in_sight(config) for alpha in whole]
  layers = [under]  # image under shape 0, under shape 1, ..., the whole rendering
  for i, alpha in enumerate(alphas):
    layers.append(layers[-1] + alpha[..., None] * (RGB[state.colour[:, i]][:, None] - layers[-1]))
  visible = [alphas[0] * (1 - alphas[1]), alphas[1]] if len(alphas) == 2 else alphas
  squared = ((x - layers[-1]) ** 2).sum(-1)
  relative = []
  for i in range(len(alphas)):
    contrast = ((RGB[state.colour[:, i]][:, None] - layers[i]) ** 2).sum(-1)
    elsewhere = 1 - sum((v for j, v in enumerate(visible) if j != i), start=np.zeros_like(squared))
    if config.shape_size < 1:  # else noise over a large picture would outweigh a small shape
      elsewhere = elsewhere * shapes_pixels.around(state.xy[:, i], config)
    relative.append(
      (squared * elsewhere).sum(-1) / np.maximum((visible[i] ** 2 * contrast).sum(-1), 1e-6)
    )
  shares = [v.sum(-1) / a.sum(-1) for v, a in zip(visible, whole, strict=True)]
  # A mean over 3 channels; squares on the [-1, 1] scale are 4 times those on [0, 1].
  error = 4 / 3 * squared.mean(-1)
  return Fit(
    state.colour, state.shape, state.xy, error, np.stack(relative, -1), np.stack(shares, -1)
  )


def _concatenate(parts: list):
  """Joins dataclasses of arrays along their first axis."""
  names = vars(parts[0])
  arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
  return type(parts[0])(**arrays)
