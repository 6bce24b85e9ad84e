"""True first frames for a prompt: of the world, as the prompt says, and each seed its own."""

import numpy as np
import pytest

from hiar_jax.data import shapes_described, shapes_world
from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.evaluation import shapes_truth

WORLDS = {
  "plain": WorldConfig(),
  "textured": WorldConfig(difficulty="textured"),
  "screen": WorldConfig(size=64, frames=45, shape_size=0.375, pace=0.275, hidden=12),
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_scene_is_what_its_prompt_says(name):
  world = WORLDS[name]
  prompts = shapes_world.prompts("held_out", world)[:40]
  for seed, prompt in enumerate(prompts):
    scene = shapes_described.scene_of(prompt, np.random.default_rng(seed), world)
    assert shapes_world.caption(scene) == prompt
    assert len({shape.colour for shape in scene.shapes}) == world.shapes_per_clip


def test_what_a_prompt_does_not_name_is_drawn():
  draw = lambda seed: shapes_described.scene_of(
    "a zebra moving up", np.random.default_rng(seed), WORLDS["plain"]
  )
  (shapes,) = zip(*(draw(seed).shapes for seed in range(40)), strict=True)
  assert {shape.direction for shape in shapes} == {"up"}
  assert len({shape.colour for shape in shapes}) > 3 and len({s.shape for s in shapes}) == 3
  two = shapes_described.scene_of("a red circle", np.random.default_rng(0), WORLDS["textured"])
  assert two.shapes[0].colour == "red" != two.shapes[1].colour and two.background != "plain"


def test_true_videos_are_measured_as_true():
  prompts = shapes_world.prompts("held_out", WORLDS["plain"])[:6]
  videos = [
    shapes_described.true_video(prompt, seed, WORLDS["plain"], 9)
    for seed, prompt in enumerate(prompts)
  ]
  found = shapes_truth.measure(np.stack(videos), prompts, WORLDS["plain"])
  assert found["colour"]["total"] == found["shape"]["total"] == found["direction"]["total"] == 1
  assert found["error"]["total"] < 1e-3


def test_a_seed_has_its_own_start():
  start = lambda seed, frames=1: shapes_described.true_video(
    "a red circle", seed, WORLDS["plain"], frames
  )
  assert start(0).shape == (1, 32, 32, 3) and start(0).dtype == np.uint8
  np.testing.assert_array_equal(start(3), start(3, 5)[:1])
  assert (start(3) != start(4)).any()
