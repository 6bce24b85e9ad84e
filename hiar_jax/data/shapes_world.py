"""The shapes world: coloured shapes that move and bounce, rendered exactly, described in words.

`Scene` is the full state at t = 0, `simulate` gives the state of any frame in closed form, `render`
draws it with sub-pixel accurate edges: generated videos can be measured against the exact state
that their prompt describes. In a world with a screen (`hidden`), a shape passes behind it, out of
sight, and captions do not name its colour: to show it again, a model has to remember it.

Units: pixels and pixels per frame; x to the right, y down; pixel (i, j) covers [j, j+1] x [i, i+1];
images in [0, 1] unless marked uint8. Lengths and speeds scale with the image; the constants here
are for 32 x 32.
"""

from collections.abc import Callable
import dataclasses
import functools
import re

import numpy as np

from hiar_jax.data import shapes_screen, shapes_textures
from hiar_jax.errors import UserError

COLOURS = {
  "red": (0.92, 0.16, 0.16),
  "green": (0.16, 0.76, 0.24),
  "blue": (0.20, 0.32, 0.96),
  "yellow": (0.96, 0.86, 0.18),
  "magenta": (0.90, 0.24, 0.86),
  "cyan": (0.20, 0.84, 0.90),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Pixels per frame; fast enough that clips also show motion far from a wall after its bounce.
SPEEDS = {"slowly": 1.5, "": 2.2, "quickly": 3.0}
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "gradient")
VOCABULARY = (
  "a",
  "and",
  "on",
  "moving",
  "background",
  *COLOURS,
  *SHAPES,
  *DIRECTIONS,
  *filter(None, SPEEDS),
  *BACKGROUNDS[1:],
)
SPLITS = ("train", "held_out")

_REFERENCE_SIZE = 32  # pixels, for which lengths and speeds are given
VIDEO_CLIPS = 4  # clips that one video is cut into
# Frames of straight motion before the first wall: the start position correlates with the direction,
# so that a network can infer it even at the highest noise level.
FREE_FRAMES = 6
_CROSSING_TRIES = 8  # scenes drawn until the two shapes of a textured clip meet
_SUBLINES = 4  # scan lines per pixel row; edges along a line are exact


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """Sizes and difficulty of the world: `plain` has one shape on dark grey, `textured` two shapes
  that cross on a texture.

  later: share of clips that are the second to fourth clip of their video, when it is cut end to
    end. Their caption is the video's: it gives the initial direction, not the one after bounces,
    which is the case that a model of long videos meets.
  shape_size, pace: factors of the shapes' sizes and speeds, which scale with the image alone.
  hidden: frames that a shape is wholly out of sight when it passes behind the screen; 0 for a world
    without one. Such a world has one shape at one speed.

  Raises:
    UserError: an unknown difficulty, `later` outside [0, 1], or an image or clip too small to show
      a shape move, and pass behind the screen.
  """

  size: int = 32  # height and width, pixels
  frames: int = 9  # of a clip
  difficulty: str = "plain"
  later: float = 0.0
  shape_size: float = dataclasses.field(default=1.0, metadata={"since": "2026-11"})
  pace: float = dataclasses.field(default=1.0, metadata={"since": "2026-11"})
  hidden: int = dataclasses.field(default=0, metadata={"since": "2026-11"})

  def __post_init__(self):
    if self.difficulty not in ("plain", "textured"):
      raise UserError(
        f"world difficulty {self.difficulty!r} is unknown; choose 'plain' or 'textured'"
      )
    if not 0 <= self.later <= 1:
      raise UserError(f"later = {self.later}: expected the share of clips that start later, 0 to 1")
    if self.size < 16 or self.frames < 1:
      raise UserError(
        f"world of {self.frames} frames of {self.size} px is too small; use size >= 16 and frames "
        ">= 1"
      )
    room = self.size - 2 * self.radius
    if min(self.shape_size, self.pace) <= 0 or room < FREE_FRAMES * self.speed("quickly"):
      raise UserError(
        f"shape_size = {self.shape_size}, pace = {self.pace}: a shape must fit into the picture "
        f"and move for {FREE_FRAMES} frames before a wall; use positive, smaller ones"
      )
    if self.hidden:
      if self.difficulty != "plain":
        raise UserError(f"hidden = {self.hidden}: the screen is of the plain world alone")
      shapes_screen.check(self.size, self.frames, self.radius, self.speed(""), self.hidden)

  @property
  def scale(self) -> float:
    return self.size / _REFERENCE_SIZE

  @property
  def radius(self) -> float:
    """Half the side of the bounding box of a shape, pixels."""
    return 5.5 * self.scale * self.shape_size

  @property
  def screen(self) -> tuple[int, int] | None:
    """The pixels [low, high) of both axes that the screen covers; None without one."""
    edges = shapes_screen.edges(self.size, self.radius, self.speed(""), self.hidden)
    return edges if self.hidden else None

  @property
  def shapes_per_clip(self) -> int:
    return 2 if self.difficulty == "textured" else 1

  def speed(self, word: str) -> float:
    """Returns the pixels per frame of an adverb ('' for none)."""
    return SPEEDS[word] * self.scale * self.pace


@dataclasses.dataclass(frozen=True)
class Shape:
  """One shape at t = 0, in words and in numbers."""

  colour: str
  shape: str
  direction: str
  speed: str  # the adverb, '' for none
  position: tuple[float, float]  # centre, x y
  velocity: tuple[float, float]
  radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """The full state at t = 0; later shapes lie in front of earlier ones."""

  shapes: tuple[Shape, ...]
  background: str
  size: int
  screen: tuple[int, int] | None = None  # as WorldConfig.screen


@dataclasses.dataclass(frozen=True)
class States:
  """The state of f frames of n shapes; ids are indices into COLOURS, SHAPES and BACKGROUNDS."""

  position: np.ndarray  # float64 [f, n, 2], centre, x y
  velocity: np.ndarray  # float64 [f, n, 2]
  radius: np.ndarray  # float64 [n]
  colour: np.ndarray  # int32 [n]
  shape: np.ndarray  # int32 [n]
  background: int


@dataclasses.dataclass(frozen=True)
class ParsedShape:
  """One shape of a prompt; None for what the prompt does not name, '' for a missing adverb."""

  colour: str | None = None
  shape: str | None = None
  direction: str | None = None
  speed: str = ""


# Captions


def caption(scene: Scene) -> str:
  """Returns 'a red circle moving left slowly', joined by 'and', with ' on a striped background'
  unless the background is plain; 'a circle moving left' of one that passes behind a screen.
  """
  named = [s.colour if scene.screen is None else "" for s in scene.shapes]
  shapes = [(c, s.shape, s.direction, s.speed) for c, s in zip(named, scene.shapes, strict=True)]
  return _sentence(shapes, scene.background)


def parse_caption(text: str) -> tuple[tuple[ParsedShape, ...], str | None]:
  """Parses a prompt, in any word order: its shapes, and its background if it names a texture.

  Words outside of the world are ignored.
  """
  shapes: list[dict] = []
  background = None
  kinds = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "speed": SPEEDS}
  for word in re.findall(r"[^\W_]+", text.lower()):
    kind = next((k for k, words in kinds.items() if word in words), None)
    if kind:
      # A colour, or a second word of the same kind, starts the next shape.
      if not shapes or kind in shapes[-1] or (kind == "colour" and "shape" in shapes[-1]):
        shapes.append({})
      shapes[-1][kind] = word
    elif word in BACKGROUNDS:
      background = word
  return tuple(ParsedShape(**s) for s in shapes), background


def held_out(colour: str, shape: str, direction: str) -> bool:
  """Returns True for the 9 of 72 triples held out of training; every pair of words stays in it."""
  i = list(COLOURS).index(colour)
  j = SHAPES.index(shape)
  d = list(DIRECTIONS).index(direction)
  return (i + j) % 2 == 0 and d == (i // 2 + j) % 4


@functools.lru_cache
def triples(split: str) -> tuple[tuple[str, str, str], ...]:
  """Returns the (colour, shape, direction) of a split, in a fixed order.

  Raises:
    UserError: an unknown split.
  """
  if split not in SPLITS:
    raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
  every = ((c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS)
  return tuple(t for t in every if held_out(*t) == (split == "held_out"))


def passages(split: str) -> list[tuple[str, str]]:
  """Returns the (shape, direction) of a split of a world with a screen: 3 of 12 are held out."""
  every = [(s, d, k == j + 1) for j, s in enumerate(SHAPES) for k, d in enumerate(DIRECTIONS)]
  return [(s, d) for s, d, held in every if held == (split == "held_out")]


def prompts(split: str, config: WorldConfig) -> list[str]:
  """Returns the distinct prompts of a split.

  Plain: every triple at every speed. Textured: every pair of triples of two colours, with speeds
  and textures that rotate along the list (all combinations would be about 100,000). With a screen:
  every pair of shape and direction.
  """
  if config.hidden:
    return [_sentence([("", *pair, "")], "plain") for pair in passages(split)]
  if config.difficulty == "plain":
    return [_sentence([(*t, speed)], "plain") for t in triples(split) for speed in SPEEDS]
  pairs = [(a, b) for a in triples(split) for b in triples(split) if a[0] != b[0]]
  speeds, textures = list(SPEEDS), BACKGROUNDS[1:]
  return [
    _sentence([(*a, speeds[i % 3]), (*b, speeds[i // 3 % 3])], textures[i % len(textures)])
    for i, (a, b) in enumerate(pairs)
  ]


def _sentence(shapes: list[tuple[str, str, str, str]], background: str) -> str:
  """Returns the caption of shapes, (colour, shape, direction, speed) each."""
  phrases = [
    " ".join(filter(None, ("a", colour, shape, "moving", direction, speed)))
    for colour, shape, direction, speed in shapes
  ]
  where = "" if background == "plain" else f" on a {background} background"
  return " and ".join(phrases) + where


# States of a scene


def sample_scene(rng: np.random.Generator, config: WorldConfig, split: str = "train") -> Scene:
  """Draws a scene of a split; two shapes differ in colour, start apart and mostly meet."""
  return apart(lambda: _draw_scene(rng, config, split), config)


def apart(draw: Callable[[], Scene], config: WorldConfig) -> Scene:
  """Returns the first drawn scene whose shapes, of two, start apart and meet in the first clip of
  the video; after _CROSSING_TRIES that start apart, one whose shapes do not meet.
  """
  tries = 0
  while True:
    scene = draw()
    if config.shapes_per_clip == 1:
      return scene
    centres = simulate(scene, config.frames).position
    # Chebyshev distance in radii, [f]: 2 = bounding boxes touch, 0 = one hides the other.
    gaps = np.abs(centres[:, 0] - centres[:, 1]).max(-1) / config.radius
    tries += gaps[0] > 1.5  # nearer, the hidden shape's motion would not be visible
    if gaps[0] > 1.5 and (gaps.min() < 1 or tries >= _CROSSING_TRIES):
      return scene


def _draw_scene(rng: np.random.Generator, config: WorldConfig, split: str) -> Scene:
  # The order of the draws from rng determines the data sets of a seed: keep it.
  if config.hidden:
    options, colours = passages(split), list(COLOURS)
    shape, direction = options[rng.integers(len(options))]
    colour = colours[rng.integers(len(colours))]
    shapes = (place(rng, config, colour, shape, direction, ""),)
    return Scene(shapes, "plain", config.size, config.screen)
  options, shapes = triples(split), []
  while len(shapes) < config.shapes_per_clip:
    colour, shape, direction = options[rng.integers(len(options))]
    if any(colour == s.colour for s in shapes):
      continue
    word = list(SPEEDS)[rng.integers(len(SPEEDS))]
    shapes.append(place(rng, config, colour, shape, direction, word))
  textured = config.difficulty == "textured"
  background = BACKGROUNDS[rng.integers(1, len(BACKGROUNDS))] if textured else "plain"
  return Scene(tuple(shapes), background, config.size)


def place(
  rng: np.random.Generator, config: WorldConfig, colour: str, shape: str, direction: str, speed: str
) -> Shape:
  """Draws where a shape starts: at a free run from its first wall, or on its way to the screen."""
  velocity = np.array(DIRECTIONS[direction]) * config.speed(speed)
  if config.hidden:
    position = shapes_screen.sample_centre(rng, velocity, config.size, config.radius, config.screen)
  else:
    low, high, run = config.radius, config.size - config.radius, velocity * FREE_FRAMES
    # Both the start and the end of the free run lie between the walls.
    position = rng.uniform(np.maximum(low, low - run), np.minimum(high, high - run))
  numbers = tuple(position.tolist()), tuple(velocity.tolist()), config.radius
  return Shape(colour, shape, direction, speed, *numbers)


def simulate(scene: Scene, frames: int, start: int = 0) -> States:
  """Returns the state of `frames` frames from frame `start` on.

  Centres move straight and bounce elastically within [radius, size - radius]; in closed form (a
  triangle wave of the unfolded path), so frame 10,000 is as exact as frame 1.
  """
  origin = np.array([s.position for s in scene.shapes])  # [n, 2]
  speed = np.array([s.velocity for s in scene.shapes])  # [n, 2]
  radius = np.array([s.radius for s in scene.shapes])  # [n]
  room = (scene.size - 2 * radius)[:, None]  # distance between the walls, [n, 1]
  low = radius[:, None]
  # Unfolded path modulo a return trip, [f, n, 2]; beyond room the shape is on its way back.
  path = np.mod(origin - low + np.arange(start, start + frames)[:, None, None] * speed, 2 * room)
  back = path > room
  return States(
    position=low + np.where(back, 2 * room - path, path),
    velocity=np.where(back, -speed, speed),
    radius=radius,
    colour=np.array([list(COLOURS).index(s.colour) for s in scene.shapes], np.int32),
    shape=np.array([SHAPES.index(s.shape) for s in scene.shapes], np.int32),
    background=BACKGROUNDS.index(scene.background),
  )


# Rendering


def render(states: States, background: np.ndarray, config: WorldConfig) -> np.ndarray:
  """Draws every frame over `background` (float32 [H, W, 3] in [0, 1]) -> uint8 [f, H, W, 3]."""
  image = np.broadcast_to(background, (len(states.position), config.size, config.size, 3))
  # Back to front: each shape covers the image so far.
  for n, (colour, shape) in enumerate(zip(states.colour, states.shape, strict=True)):
    rgb = np.array(list(COLOURS.values())[colour], np.float32)
    alpha = alpha_mask(SHAPES[shape], states.position[:, n], states.radius[n], config.size)
    image = image + alpha[..., None] * (rgb - image)
  return np.rint(255 * shapes_screen.draw(image, config.screen)).astype(np.uint8)


def alpha_mask(shape: str, xy: np.ndarray, radius: float, size: int) -> np.ndarray:
  """Returns the share of each pixel that a shape covers: centres [..., 2] -> float32
  [..., size, size].

  Every shape is one symmetric interval per scan line, so coverage along a line is exact. The lines
  of a pixel row are spread over the part of the row that the bounding box touches, so horizontal
  edges are exact too.
  """
  xy = np.asarray(xy, np.float64)[..., None, None]
  x, y = xy[..., 0, :, :], xy[..., 1, :, :]  # [..., 1, 1], against pixel rows and columns
  reach = _BOX[shape] * radius
  edge = np.arange(size, dtype=np.float64)
  top = np.clip(edge[:, None], y - reach, y + reach)
  bottom = np.clip(edge[:, None] + 1, y - reach, y + reach)
  alpha = np.zeros(np.broadcast_shapes(x.shape, (size, size)))
  for line in range(_SUBLINES):
    # Midpoint of sub-line `line`, relative to the centre: [..., size, 1]
    height = top + (bottom - top) * (line + 0.5) / _SUBLINES - y
    half = _half_width(shape, height, radius)
    alpha += np.clip(np.minimum(edge + 1, x + half) - np.maximum(edge, x - half), 0, 1)
  return (alpha * (bottom - top) / _SUBLINES).astype(np.float32)


# Half the height / radius; areas are 3.1, 3.2 and 2 radius^2.
_BOX = {"circle": 1.0, "square": 0.9, "triangle": 1.0}


def _half_width(shape: str, height: np.ndarray, radius: float) -> np.ndarray:
  """Returns half the width of the shape at `height` below its centre (within its box)."""
  if shape == "circle":
    return np.sqrt(np.maximum(radius**2 - height**2, 0))
  if shape == "square":
    return np.full_like(height, _BOX["square"] * radius)
  return (height + radius) / 2  # triangle: apex at the top, the base as wide as the box


def background_image(name: str, config: WorldConfig) -> np.ndarray:
  """Returns the grey texture of a background's name, float32 [H, W, 3] in [0, 1]."""
  return shapes_textures.texture(name, config.size, _REFERENCE_SIZE).copy()
