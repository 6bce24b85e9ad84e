"""Larger and slower worlds, and the one whose shape passes behind a screen: sizes, times, captions,
and what they leave in a data set.
"""

import numpy as np
import pytest

from hiar_jax.data import shapes_clips, shapes_screen, shapes_world, tfds_builder
from hiar_jax.data.shapes_world import COLOURS, DIRECTIONS, SHAPES, WorldConfig
from hiar_jax.data.sources import DataConfig
from hiar_jax.errors import UserError

SLOW = {"shape_size": 0.375, "pace": 0.275, "hidden": 12}
WORLDS = [
  WorldConfig(size=64, frames=45, **SLOW),
  WorldConfig(size=32, frames=45, **SLOW),
  WorldConfig(size=64, frames=60, **(SLOW | {"hidden": 20, "pace": 0.2})),
]


def _scenes(world, count=24, split="train"):
  rng = np.random.default_rng(0)
  return [shapes_world.sample_scene(rng, world, split) for _ in range(count)]


def _video(scene, world):
  under = shapes_world.background_image(scene.background, world)
  return shapes_world.render(shapes_world.simulate(scene, world.frames), under, world)


@pytest.mark.parametrize("world", WORLDS, ids=["64", "32", "longer"])
def test_a_shape_is_seen_then_hidden_then_seen_again(world):
  """By the pictures alone: how much of each frame is neither ground nor screen."""
  low, high = world.screen
  ground = np.rint(255 * shapes_world.background_image("plain", world))
  ground[low:high, low:high] = np.rint(255 * shapes_screen.GREY)
  for scene in _scenes(world):
    video = _video(scene, world)
    assert np.all(video[:, low:high, low:high] == ground[low, low])
    away = np.abs(video - ground).sum(-1)
    shown = away.sum((1, 2)) / away[0].sum()
    seen = shapes_screen.SHOWN_FRAMES
    np.testing.assert_allclose(shown[:seen], 1, atol=0.05)
    np.testing.assert_allclose(shown[-shapes_screen.RETURN_FRAMES :], 1, atol=0.05)
    out_of_sight = np.flatnonzero(shown == 0)
    assert len(out_of_sight) >= world.hidden
    np.testing.assert_array_equal(np.diff(out_of_sight), 1)
    # Longer by the rounding of the screen to whole pixels, and by a square's smaller box.
    longer = (2 + 0.2 * world.radius) / world.speed("")
    assert len(out_of_sight) <= world.hidden + 1 + longer


@pytest.mark.parametrize("world", WORLDS, ids=["64", "32", "longer"])
def test_a_shape_comes_out_on_the_opposite_side_on_its_way(world):
  for scene in _scenes(world):
    (shape,) = scene.shapes
    states = shapes_world.simulate(scene, world.frames)
    along = (states.position[:, 0] - world.size / 2) @ np.array(DIRECTIONS[shape.direction])
    assert along[0] < 0 < along[-1]
    free = along <= world.size / 2 - world.radius - world.speed("")
    steps = np.diff(along)[
      free[1:] & free[:-1] & (states.velocity[1:, 0] == shape.velocity).all(-1)
    ]
    np.testing.assert_allclose(steps, world.speed(""))


def test_captions_leave_the_colour_open():
  world = WORLDS[0]
  trained, held = (shapes_world.prompts(split, world) for split in shapes_world.SPLITS)
  assert len(held) == 3 and len(trained) == 9 and not set(trained) & set(held)
  every = {f"a {shape} moving {direction}" for shape in SHAPES for direction in DIRECTIONS}
  assert {*trained, *held} == every
  assert {word for text in held for word in text.split()} <= {
    word for text in trained for word in text.split()
  }
  for split, prompts in (("train", trained), ("held_out", held)):
    colours = {}
    for scene in _scenes(world, 300, split):
      colours.setdefault(shapes_world.caption(scene), set()).add(scene.shapes[0].colour)
    assert colours == {prompt: set(COLOURS) for prompt in prompts}
  ((shape,), _) = shapes_world.parse_caption(trained[0])
  assert shape.colour is None and shape.speed == ""


def test_a_larger_room_with_shapes_of_the_same_pixels():
  """At 64 x 64, half the factors give the shapes and speeds of 32 x 32, and walls further apart."""
  small, large = WorldConfig(), WorldConfig(size=64, frames=45, shape_size=0.5, pace=0.5)
  assert large.radius == small.radius == 5.5
  assert [large.speed(word) for word in shapes_world.SPEEDS] == [1.5, 2.2, 3.0]
  scenes = _scenes(large, 100)
  positions = np.stack([shapes_world.simulate(scene, 200).position for scene in scenes])
  assert 5.5 <= positions.min() < 6 and 58 < positions.max() <= 58.5
  late = WorldConfig(size=64, frames=45, shape_size=0.5, pace=0.5, later=1.0)
  starts = {int(shapes_clips.make_clip(late, 0, i)["start"]) for i in range(20)}
  assert starts == {45, 90, 135}
  as_pixels = _video(scenes[0], large)[0]
  alone = shapes_world.alpha_mask(scenes[0].shapes[0].shape, scenes[0].shapes[0].position, 5.5, 64)
  assert ((as_pixels != as_pixels[0, 0]).any(-1) <= (alone > 0)).all() and (alone > 0).sum() < 160


def test_the_factors_are_of_the_data_config_too():
  fields = {"size": 64, "frames": 45, **SLOW}
  assert DataConfig(**fields).opened.world == WORLDS[0]
  assert DataConfig().opened.world == WorldConfig()


def test_only_a_changed_factor_is_in_the_recipe(tmp_path):
  """Data sets of before the factors are those of their defaults, and no others."""
  shapes_clips.prepare(tmp_path / "old", WorldConfig(), clips=2, seed=0)
  recipe = tfds_builder.read_recipe(tmp_path / "old")
  assert set(recipe) == {"kind", "size", "frames", "difficulty", "later", "clips", "seed"}
  with pytest.raises(UserError, match="pace=None, but this run wants pace=0.5"):
    shapes_clips.prepare(tmp_path / "old", WorldConfig(pace=0.5), clips=2, seed=0)


def test_clips_of_a_screen_are_written(tmp_path):
  world = WORLDS[1]
  shapes_clips.prepare(tmp_path, world, clips=3, seed=1)
  assert tfds_builder.read_recipe(tmp_path)["hidden"] == 12
  for i, record in enumerate(tfds_builder.open_source(tmp_path)):
    clip = shapes_clips.make_clip(world, 1, i)
    np.testing.assert_array_equal(record["video"], clip["video"])
    caption = record["caption"].decode()
    assert caption == clip["caption"] and not set(caption.split()) & set(COLOURS)
    assert record["colour"] == clip["colour"]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"pace": 0}, "pace = 0"),
    ({"shape_size": -1.0}, "shape_size = -1.0"),
    ({"pace": 1.2}, "before a wall"),
    ({"shape_size": 2.0}, "before a wall"),
    (SLOW | {"hidden": -1}, "hidden = -1"),
    (SLOW | {"hidden": 30}, "no room for 9 frames in sight"),
    (SLOW | {"frames": 39}, "use at least 40 frames"),
    (SLOW | {"difficulty": "textured"}, "the plain world alone"),
  ],
)
def test_a_world_that_cannot_be_is_one_clear_line(fields, message):
  with pytest.raises(UserError, match=message) as error:
    WorldConfig(**({"size": 64, "frames": 45} | fields))
  assert "\n" not in str(error.value)
