"""The fit finds what the world drew: form, colour, place, order, also through noise, blur and other
shapes.
"""

import itertools

import numpy as np
import pytest

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import BACKGROUNDS, COLOURS, SHAPES, Scene, Shape, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.evaluation import shapes_fit

PLAIN, TEXTURED = WorldConfig(), WorldConfig(difficulty="textured")


def blur(videos):
  for axis in (-3, -2):
    videos = (np.roll(videos, 1, axis) + 2 * videos + np.roll(videos, -1, axis)) / 4
  return videos


def stills(config, seed=0, margin=0.0):
  """Every colour and form once at a random place: a video of 18 frames, and the truth."""
  kinds = list(itertools.product(range(len(COLOURS)), range(len(SHAPES))))
  low = config.radius + margin
  xy = np.random.default_rng(seed).uniform(low, config.size - low, (len(kinds), 2))
  under = shapes_world.background_image("plain", config)
  frames = []
  for (colour, shape), place in zip(kinds, xy, strict=True):
    alpha = shapes_world.alpha_mask(SHAPES[shape], place, config.radius, config.size)[..., None]
    frames.append(under + alpha * (shapes_fit.RGB[colour] - under))
  return 2 * np.stack(frames)[None] - 1, np.asarray(kinds), xy


def crossing(size=32, frames=12, background="striped"):
  """A yellow circle that passes behind a blue square."""
  config = WorldConfig(size=size, difficulty="textured")
  k = config.scale
  circle = Shape(
    "yellow", "circle", "right", "", (7 * k, 16 * k), (1.6 * k, 0.3 * k), config.radius
  )
  square = Shape("blue", "square", "left", "", (25 * k, 16 * k), (-1.6 * k, 0.3 * k), config.radius)
  scene = Scene((circle, square), background, size)
  states = shapes_world.simulate(scene, frames)
  return (
    config,
    states,
    shapes_world.render(states, shapes_world.background_image(background, config), config)[None],
  )


@pytest.mark.parametrize(
  "size, degrade, tolerance",
  [
    (32, lambda x: x, 0.01),
    (32, lambda x: x + np.random.default_rng(1).normal(0, 0.1, x.shape), 0.15),
    (32, blur, 0.3),  # the nearest sharp square to a blurred one leans towards whole pixels
    (48, lambda x: x, 0.02),
  ],
)
def test_one_shape(size, degrade, tolerance):
  config = WorldConfig(size=size)
  videos, kinds, xy = stills(config, margin=2.0)
  found = shapes_fit.fit_videos(degrade(videos), ["plain"], config)
  np.testing.assert_array_equal(found.colour[0, :, 0], kinds[:, 0])
  np.testing.assert_array_equal(found.shape[0, :, 0], kinds[:, 1])
  distance = np.linalg.norm(found.xy[0, :, 0] - xy, axis=-1)
  assert distance.max() < tolerance and distance.mean() < tolerance / 2
  assert (found.visible == 1).all()


def test_error_is_the_mean_square_on_the_scale_from_minus_one_to_one():
  videos, *_ = stills(PLAIN)
  noise = np.random.default_rng(0).normal(0, 0.1, videos.shape)
  clean, noisy = (
    shapes_fit.fit_videos(x, ["plain"], PLAIN).error for x in (videos, videos + noise)
  )
  assert clean.shape == (1, 18) and clean.max() < 1e-6
  np.testing.assert_allclose(noisy, (noise**2).mean((2, 3, 4)), rtol=0.01)


def test_relative_error_is_the_share_of_the_shape_that_is_gone():
  videos, *_ = stills(PLAIN)
  under = 2 * shapes_world.background_image("plain", PLAIN) - 1
  for strength in (1.0, 0.8):
    relative = shapes_fit.fit_videos(under + strength * (videos - under), ["plain"], PLAIN).relative
    np.testing.assert_allclose(relative, (1 - strength) ** 2, atol=2e-3)
  empty = shapes_fit.fit_videos(
    np.broadcast_to(under, (1, 3, 32, 32, 3)), ["plain"], PLAIN
  ).relative
  np.testing.assert_allclose(empty, 1, rtol=1e-3)


def test_places_stay_within_the_walls():
  config, xy = PLAIN, np.asarray([[2.0, 16.0], [31.0, 31.0]])
  alpha = shapes_world.alpha_mask("square", xy, config.radius, config.size)[..., None]
  found = shapes_fit.fit_videos(
    2 * (0.12 + alpha * (shapes_fit.RGB[0] - 0.12))[None] - 1, ["plain"], config
  )
  np.testing.assert_allclose(found.xy[0, :, 0], [[5.5, 16], [26.5, 26.5]], atol=0.25)


def test_frames_do_not_depend_on_their_company():
  videos, *_ = stills(PLAIN)
  many = np.concatenate([videos] * 12)  # more frames than are fitted at once
  alone = shapes_fit.fit_videos(videos[:, 3:5], ["plain"], PLAIN)
  together = shapes_fit.fit_videos(many, ["plain"] * 12, PLAIN)
  np.testing.assert_allclose(together.xy[-1, 3:5], alone.xy[0], atol=1e-4)
  np.testing.assert_array_equal(
    together.colour, np.broadcast_to(together.colour[:1], together.colour.shape)
  )


@pytest.mark.parametrize("degrade, tolerance", [(lambda x: x, 0.02), (blur, 0.4)])
def test_two_shapes_cross(degrade, tolerance):
  config, states, videos = crossing()
  found = shapes_fit.fit_videos(degrade(videos / 127.5 - 1), ["striped"], config)
  by_colour = np.argsort(found.colour[0], 1)[:, ::-1]  # yellow (3) before blue (2)

  def take(array):
    return np.take_along_axis(array, by_colour.reshape(12, 2, *[1] * (array.ndim - 2)), 1)

  seen = take(found.visible[0]) > 0.5
  assert 0 < (~seen).sum() < 8
  np.testing.assert_array_equal(
    take(found.colour[0])[seen], np.broadcast_to(states.colour, (12, 2))[seen]
  )
  np.testing.assert_array_equal(
    take(found.shape[0])[seen], np.broadcast_to(states.shape, (12, 2))[seen]
  )
  assert np.linalg.norm(take(found.xy[0]) - states.position, axis=-1)[seen].max() < tolerance
  overlap = (found.visible[0] < 0.9).any(-1)
  assert overlap.sum() >= 4 and (found.colour[0, overlap, 1] == 2).all()  # the square is in front


def test_two_shapes_of_another_size():
  config, states, videos = crossing(size=48, frames=3)
  found = shapes_fit.fit_videos(videos, ["striped"], config)
  assert found.error.max() < 2e-5
  assert sorted(found.colour[0, 0]) == sorted(states.colour)


def test_a_missing_shape_is_told():
  config, _, videos = crossing(frames=2)
  gone = shapes_world.background_image("striped", config)
  videos = videos.copy()
  videos[:, :, :, 16:] = np.rint(255 * gone[:, 16:])  # the blue square's half
  found = shapes_fit.fit_videos(videos, ["striped"], config)
  yellow = found.colour[0] == 3
  assert (found.relative[0][yellow] < 0.05).all()
  assert ((found.relative[0] > 0.9) | (found.visible[0] < 0.1))[~yellow].all()


def test_one_spoilt_shape_is_not_held_against_the_other():
  config, states, videos = crossing(frames=2)
  x = videos / 127.5 - 1
  for i in range(2):
    square = shapes_world.alpha_mask("square", states.position[i, 1], config.radius, config.size)[
      ..., None
    ]
    x[0, i] += square * (1 - x[0, i])  # white: no colour of the world
  found = shapes_fit.fit_videos(x, ["striped"], config)
  assert (found.relative.max(-1) > 0.3).all() and (found.relative.min(-1) < 0.05).all()


def test_neighbours_help_where_one_shape_hides_the_other():
  green = Shape("green", "triangle", "down", "", (16.86, 8.27), (0.0, 1.6), 5.5)
  cyan = Shape("cyan", "triangle", "up", "slowly", (15.87, 18.86), (0.0, -1.0), 5.5)
  states = shapes_world.simulate(Scene((cyan, green), "checkered", 32), 8)
  under = shapes_world.background_image("checkered", TEXTURED)
  frames = blur(shapes_world.render(states, under, TEXTURED) / 127.5 - 1)
  together = shapes_fit.fit_videos(frames[None], ["checkered"], TEXTURED)
  alone = shapes_fit.fit_videos(frames[:, None], ["checkered"] * 8, TEXTURED)
  gain = alone.error[:, 0] - together.error[0]
  assert gain.min() > -1e-6 and gain.max() > 2e-4
  assert (np.sort(together.colour) == [1, 5]).all()


def test_unknown_background_is_found():
  videos = np.concatenate([crossing(frames=2, background=name)[2] for name in BACKGROUNDS[1:]])
  noisy = videos / 127.5 - 1 + np.random.default_rng(0).normal(0, 0.1, videos.shape)
  np.testing.assert_array_equal(
    shapes_fit.nearest_background(noisy, TEXTURED), np.repeat([[1], [2], [3], [4]], 2, 1)
  )
  assert shapes_fit.fit_videos(videos, [None] * 4, TEXTURED).error.max() < 1e-4
  assert shapes_fit.fit_videos(videos, ["gradient"] * 4, TEXTURED).error[:3].min() > 1e-2


@pytest.mark.parametrize(
  "shape, backgrounds, words",
  [
    ((1, 2, 16, 16, 3), ["plain"], "32, 32, 3"),
    ((2, 32, 32, 3), ["plain"], "expected"),
    ((2, 1, 32, 32, 3), ["plain"], "2 videos but 1"),
    ((1, 1, 32, 32, 3), ["paisley"], "'paisley' is unknown"),
  ],
)
def test_bad_input_is_one_line(shape, backgrounds, words):
  with pytest.raises(UserError, match=words) as error:
    shapes_fit.fit_videos(np.zeros(shape, np.uint8), backgrounds, PLAIN)
  assert "\n" not in str(error.value)
