"""The direction of a long clip is that of its start: what comes after the first wall is no part of
it, however a model turns there.
"""

import numpy as np
import pytest

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import DIRECTIONS, Scene, Shape, WorldConfig
from hiar_jax.evaluation import shapes_truth
from hiar_jax.evaluation.shapes_direction import Path, free_frames, heads

LONG = WorldConfig(frames=45)
LEFT = np.asarray(DIRECTIONS["left"])
SPEED = LONG.speed("")


def path(x, y=16.0) -> Path:
  """A shape that is seen in every frame, at x [f]."""
  xy = np.stack([np.asarray(x, float), np.full(len(x), y)], -1)
  seen = np.ones(len(x), bool)
  return Path(xy, seen, seen, ~seen)


def towards(wall=5.5, start=24.0, back=()):
  """x of a shape on its way to the wall, which then does as `back`."""
  x = np.arange(start, wall, -SPEED)
  return np.concatenate([x, back])


# What a model may do at the wall that no true shape does, none of it a bounce.
SLOPPY = {
  "it stays there": np.full(36, 6.0),
  "it hesitates and goes back": np.concatenate([np.full(4, 6.0), 6.0 + SPEED * np.arange(8)]),
  "it turns a little before it": 9.9 + SPEED * np.arange(8),
  "it slides along": np.linspace(6.0, 5.6, 36),
}


@pytest.mark.parametrize("name", SLOPPY)
def test_what_comes_after_the_wall_does_not_count(name):
  x = towards(back=SLOPPY[name])
  assert heads(path(x), LEFT, SPEED, LONG) == 1
  assert heads(path(32 - x), -LEFT, SPEED, LONG) == 1
  # nor does it save a shape that started in the wrong direction
  assert heads(path(x), -LEFT, SPEED, LONG) == 0
  assert heads(path(np.concatenate([np.full(20, 16.0), x])), LEFT, SPEED, LONG) == 0


def test_a_shape_that_is_slower_than_its_caption_heads_there_all_the_same():
  assert heads(path(24.0 - 0.7 * np.arange(20)), LEFT, SPEED, LONG) == 1
  assert heads(path(24.0 - 0.1 * np.arange(45)), LEFT, SPEED, LONG) == 0  # all but stands


def test_what_is_hidden_later_is_no_reason_not_to_judge():
  x = towards(back=np.full(30, 6.0))
  one = path(x)
  later = one._replace(visible=np.arange(len(x)) < 9)
  assert heads(later, LEFT, SPEED, LONG) == 1
  unseen = one._replace(visible=np.arange(len(x)) >= 9)
  assert np.isnan(heads(unseen._replace(missing=~one.visible), LEFT, SPEED, LONG))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("word", shapes_world.SPEEDS)
def test_the_wall_is_met_when_a_true_shape_meets_it(direction, word):
  speed, way = LONG.speed(word), np.asarray(DIRECTIONS[direction], float)
  for start in ((16.0, 16.0), (11.3, 20.7)):
    shape = Shape("red", "circle", direction, word, start, tuple(way * speed), LONG.radius)
    states = shapes_world.simulate(Scene((shape,), "plain", 32), 45)
    straight = np.asarray(start) + np.arange(45)[:, None] * way * speed
    free = int((np.abs(states.position[:, 0] - straight) < 1e-9).all(-1).sum()) - 1
    assert free_frames(np.asarray(start), way, speed, LONG) == max(free, 6)


def test_short_clips_are_judged_as_they_were():
  """Where no true shape meets a wall within the clip, all of its frames count."""
  rng = np.random.default_rng(0)
  for _ in range(50):
    scene = shapes_world.sample_scene(rng, WorldConfig())
    (shape,) = scene.shapes
    speed = np.abs(shape.velocity).max()
    free = free_frames(np.asarray(shape.position), np.asarray(shape.velocity), speed, WorldConfig())
    states = shapes_world.simulate(scene, 9)
    turned = (states.velocity[:, 0] != states.velocity[0, 0]).any()
    assert free >= shapes_world.FREE_FRAMES and (free >= 8) == (not turned)


def test_a_long_clip_that_turns_badly_is_measured_by_its_start():
  """Through the fit of rendered frames: the shape halts before the wall and goes back."""
  x = np.concatenate([towards(), 6.5 + 0.4 * np.arange(60)])[:45]
  positions = np.stack([x, np.full(45, 16.0)], -1)[:, None]
  states = shapes_world.States(
    positions, np.zeros_like(positions), np.asarray([LONG.radius]), np.zeros(1, int),
    np.zeros(1, int), 0,
  )  # fmt: skip
  video = shapes_world.render(states, shapes_world.background_image("plain", LONG), LONG)[None]
  for word, right in (("left", 1), ("right", 0), ("up", 0)):
    measured = shapes_truth.measure(video, [f"a red circle moving {word}"], LONG)
    assert measured["direction"]["total"] == right, word
