"""True videos of the shapes world for a prompt: the first frames that an image-to-video model is
given, of prompts that are in no data set.
"""

import numpy as np

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import (
  BACKGROUNDS,
  COLOURS,
  DIRECTIONS,
  SHAPES,
  ParsedShape,
  Scene,
  WorldConfig,
)


def scene_of(prompt: str, rng: np.random.Generator, world: WorldConfig) -> Scene:
  """Draws a scene that a prompt describes; what the prompt does not name is drawn too."""
  named, background = shapes_world.parse_caption(prompt)
  named = (*named, ParsedShape(), ParsedShape())[: world.shapes_per_clip]
  if world.difficulty == "plain":
    background = "plain"
  background = background or BACKGROUNDS[rng.integers(1, len(BACKGROUNDS))]

  def draw() -> Scene:
    shapes, left = [], [c for c in COLOURS if c not in {words.colour for words in named}]
    for words in named:
      colour = words.colour or left.pop(rng.integers(len(left)))
      shape = words.shape or SHAPES[rng.integers(len(SHAPES))]
      direction = words.direction or list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
      shapes.append(shapes_world.place(rng, world, colour, shape, direction, words.speed))
    return Scene(tuple(shapes), background, world.size, world.screen)

  return shapes_world.apart(draw, world)


def true_video(prompt: str, seed: int, world: WorldConfig, frames: int) -> np.ndarray:
  """Returns the first frames uint8 [f H W 3] of a true video of a prompt; a seed has its own."""
  scene = scene_of(prompt, np.random.default_rng(seed), world)
  background = shapes_world.background_image(scene.background, world)
  return shapes_world.render(shapes_world.simulate(scene, frames), background, world)
