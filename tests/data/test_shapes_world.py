"""The shapes world: exact pictures, exact motion, words that match, and a held-out set that stays
held out.
"""

import collections
import itertools

import numpy as np
import pytest

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.errors import UserError

CONFIGS = [
  WorldConfig(),
  WorldConfig(difficulty="textured"),
  WorldConfig(size=64, difficulty="textured"),
]
IDS = ["plain", "textured", "large"]


def _scenes(config, count=100, split="train"):
  rng = np.random.default_rng(0)
  return [shapes_world.sample_scene(rng, config, split) for _ in range(count)]


def _inside(shape, x, y, radius):
  """Is the point in the shape? Written from the shapes' definitions, not from the renderer's scan
  lines.
  """
  if shape == "circle":
    return x**2 + y**2 < radius**2
  if shape == "square":
    return np.maximum(abs(x), abs(y)) < 0.9 * radius
  corners = np.array([(0, -radius), (radius, radius), (-radius, radius)])
  edges = zip(corners, np.roll(corners, -1, 0), strict=True)
  return np.all(
    [(b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) > 0 for a, b in edges], axis=0
  )


@pytest.mark.parametrize("shape", shapes_world.SHAPES)
def test_coverage_is_that_of_supersampling(shape):
  fine = 32
  axis = (np.arange(32 * fine) + 0.5) / fine
  for centre in [(16, 16), (9.37, 20.81), (5.5, 26.5), (13.99, 7.02)]:
    inside = _inside(shape, axis[None] - centre[0], axis[:, None] - centre[1], 5.5)
    expected = inside.reshape(32, fine, 32, fine).mean((1, 3))
    alpha = shapes_world.alpha_mask(shape, np.array(centre), 5.5, 32)
    assert alpha.dtype == np.float32
    # the samples' own error where an edge runs along their grid
    assert np.abs(alpha - expected).max() < 0.03
    assert np.abs(alpha - expected).mean() < 5e-4


@pytest.mark.parametrize("shape", shapes_world.SHAPES)
def test_coverage_moves_smoothly(shape):
  """A tenth of a pixel of motion moves the centre of mass by a tenth of a pixel, in any
  direction.
  """
  steps = np.array([(12 + 0.1 * i, 15 + 0.07 * i) for i in range(30)])
  alpha = shapes_world.alpha_mask(shape, steps, 5.5, 32)
  pixel = np.arange(32) + 0.5
  mass = alpha.sum((1, 2))
  x, y = (alpha * pixel).sum((1, 2)) / mass, (alpha * pixel[:, None]).sum((1, 2)) / mass
  # A pixel's mass counts at its middle, wherever in it the shape lies: hence the tolerance.
  np.testing.assert_allclose(np.diff(x), 0.1, atol=0.012)
  np.testing.assert_allclose(np.diff(y), 0.07, atol=0.012)
  np.testing.assert_allclose(mass, mass[0], rtol=2e-3)


def test_masks_of_many_centres_are_those_of_each():
  centres = np.random.default_rng(0).uniform(6, 26, (2, 3, 2))
  many = shapes_world.alpha_mask("triangle", centres, 5.5, 32)
  assert many.shape == (2, 3, 32, 32)
  for i, j in itertools.product(range(2), range(3)):
    np.testing.assert_array_equal(
      many[i, j], shapes_world.alpha_mask("triangle", centres[i, j], 5.5, 32)
    )


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_render_composes_in_order(config):
  for scene in _scenes(config, 20):
    states = shapes_world.simulate(scene, config.frames)
    background = shapes_world.background_image(scene.background, config)
    video = shapes_world.render(states, background, config)
    assert video.shape == (config.frames, config.size, config.size, 3) and video.dtype == np.uint8
    expected = np.broadcast_to(background, video.shape).astype(np.float64)
    for n, shape in enumerate(scene.shapes):
      alpha = shapes_world.alpha_mask(
        shape.shape, states.position[:, n], shape.radius, config.size
      )[..., None]
      expected = (1 - alpha) * expected + alpha * np.array(shapes_world.COLOURS[shape.colour])
    assert np.abs(video - 255 * expected).max() <= 0.51
    # The front shape's centre shows its colour in every frame.
    for frame, (x, y) in zip(video, states.position[:, -1], strict=True):
      np.testing.assert_allclose(
        frame[int(y), int(x)], 255 * np.array(shapes_world.COLOURS[scene.shapes[-1].colour]), atol=1
      )


def test_backgrounds_are_distinct_and_grey():
  config = WorldConfig()
  images = {name: shapes_world.background_image(name, config) for name in shapes_world.BACKGROUNDS}
  for image in images.values():
    assert image.dtype == np.float32 and image.min() >= 0 and image.max() < 0.45
    assert np.all(image == image[..., :1])
  assert images["plain"].std() == 0
  for a, b in itertools.combinations(images.values(), 2):
    assert np.abs(a - b).mean() > 0.03
  image = shapes_world.background_image("plain", config)
  image[:] = 1  # the caller's own copy
  assert shapes_world.background_image("plain", config).max() < 0.2


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_bounces_keep_speed_and_walls(config):
  for scene in _scenes(config, 30):
    states = shapes_world.simulate(scene, 200)
    low, high = config.radius, config.size - config.radius
    assert states.position.min() >= low - 1e-9 and states.position.max() <= high + 1e-9
    np.testing.assert_array_equal(
      np.abs(states.velocity), np.abs(states.velocity[:1]) + 0 * states.velocity
    )
    # Between bounces the position moves by exactly the velocity; around one it moves by less.
    step = np.diff(states.position, axis=0)
    free = np.all(states.velocity[1:] == states.velocity[:-1], axis=-1)
    np.testing.assert_allclose(step[free], states.velocity[1:][free], atol=1e-9)
    assert 0.5 < free.mean() < 1


def test_any_frame_count_is_exact():
  """Against reflection step by step in exact fractions, at a far frame."""
  from fractions import Fraction

  scene = shapes_world.Scene(
    (shapes_world.Shape("red", "circle", "left", "", (9.25, 20.0), (-1.625, 0.0), 5.5),),
    "plain",
    32,
  )
  x, v = Fraction(37, 4), Fraction(-13, 8)
  low, high = Fraction(11, 2), Fraction(53, 2)
  for _ in range(5000):
    x += v
    if x < low:
      x, v = 2 * low - x, -v
    elif x > high:
      x, v = 2 * high - x, -v
  states = shapes_world.simulate(scene, 5001)
  assert states.position[5000, 0, 0] == float(x) and states.velocity[5000, 0, 0] == float(v)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_clip_from_further_on_is_a_part_of_its_video(config):
  for scene in _scenes(config, 5):
    video, clip = shapes_world.simulate(scene, 40), shapes_world.simulate(scene, 13, start=27)
    np.testing.assert_array_equal(clip.position, video.position[27:])
    np.testing.assert_array_equal(clip.velocity, video.velocity[27:])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_motion_is_what_the_caption_says(config):
  for scene in _scenes(config):
    states = shapes_world.simulate(scene, config.frames)
    for n, shape in enumerate(scene.shapes):
      step = np.diff(states.position[: shapes_world.FREE_FRAMES, n], axis=0)
      speed = shapes_world.SPEEDS[shape.speed] * config.size / 32
      np.testing.assert_allclose(
        step,
        np.tile(np.array(shapes_world.DIRECTIONS[shape.direction]) * speed, (len(step), 1)),
        atol=1e-9,
      )


def test_two_shapes_meet():
  config = WorldConfig(difficulty="textured")
  meet, start_apart = [], []
  for scene in _scenes(config, 300):
    position = shapes_world.simulate(scene, config.frames).position
    gap = np.abs(position[:, 0] - position[:, 1]).max(-1) / config.radius
    meet.append(gap.min() < 1.5)
    start_apart.append(gap[0] > 1.5)
    assert scene.shapes[0].colour != scene.shapes[1].colour
  assert np.mean(meet) > 0.8 and all(start_apart)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_captions_parse_back(config):
  for split in shapes_world.SPLITS:
    for scene in _scenes(config, 50, split):
      shapes, background = shapes_world.parse_caption(shapes_world.caption(scene))
      assert [(s.colour, s.shape, s.direction, s.speed) for s in shapes] == [
        (s.colour, s.shape, s.direction, s.speed) for s in scene.shapes
      ]
      assert background == (None if scene.background == "plain" else scene.background)
      assert set(shapes_world.caption(scene).split()) <= set(shapes_world.VOCABULARY)


def test_parsing_is_tolerant():
  shapes, background = shapes_world.parse_caption(
    "A BLUE square, flying upwards; then green circle on checkered stuff"
  )
  assert shapes == (
    shapes_world.ParsedShape("blue", "square"),
    shapes_world.ParsedShape("green", "circle"),
  )
  assert background == "checkered"
  assert shapes_world.parse_caption("circle moving left") == (
    (shapes_world.ParsedShape(None, "circle", "left"),),
    None,
  )
  for nothing in ("a dog", ""):
    assert shapes_world.parse_caption(nothing) == ((), None)


def test_held_out_triples_are_few_and_their_parts_are_trained():
  train, held = shapes_world.triples("train"), shapes_world.triples("held_out")
  assert len(held) == 9 and len(train) == 63 and not set(train) & set(held)
  for part in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]:
    seen = {tuple(t[i] for i in part) for t in train}
    assert {tuple(t[i] for i in part) for t in held} <= seen
  assert max(collections.Counter(t[2] for t in held).values()) <= 3  # no direction is singled out
  with pytest.raises(UserError, match="split 'test' is unknown"):
    shapes_world.triples("test")


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_splits_never_mix(config):
  for split in shapes_world.SPLITS:
    wanted = split == "held_out"
    for scene in _scenes(config, 300, split):
      assert all(
        shapes_world.held_out(s.colour, s.shape, s.direction) == wanted for s in scene.shapes
      )
    listed = shapes_world.prompts(split, config)
    assert len(set(listed)) == len(listed) > 20
    for prompt in listed:
      shapes, _ = shapes_world.parse_caption(prompt)
      assert len(shapes) == config.shapes_per_clip
      assert all(shapes_world.held_out(s.colour, s.shape, s.direction) == wanted for s in shapes)


def test_scenes_follow_the_seed_alone():
  config = WorldConfig(difficulty="textured")
  assert _scenes(config, 5) == _scenes(config, 5)
  assert shapes_world.sample_scene(np.random.default_rng(1), config) != _scenes(config, 1)[0]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"difficulty": "hard"}, "difficulty 'hard' is unknown"),
    ({"size": 8}, "too small"),
    ({"frames": 0}, "too small"),
  ],
)
def test_bad_config_is_one_clear_line(fields, message):
  with pytest.raises(UserError, match=message) as error:
    WorldConfig(**fields)
  assert "\n" not in str(error.value)
