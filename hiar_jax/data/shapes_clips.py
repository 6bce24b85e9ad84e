"""The shapes world as a TFDS data set: captioned clips with their true state."""

import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.config.workdir import to_json
from hiar_jax.data import shapes_world, tfds_builder
from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.errors import UserError


def make_clip(world: WorldConfig, seed: int, index: int, split: str = "train") -> dict[str, Any]:
  """Returns clip `index` of the endless sequence of a seed, as one record of `prepare`."""
  rng = np.random.default_rng((seed, index))
  # The order of the draws is part of the data set: scene, then start.
  scene = shapes_world.sample_scene(rng, world, split)
  later = rng.random() < world.later
  start = world.frames * int(rng.integers(1, shapes_world.VIDEO_CLIPS)) if later else 0
  states = shapes_world.simulate(scene, world.frames, start)
  background = shapes_world.background_image(scene.background, world)
  return {
    "video": shapes_world.render(states, background, world),
    "start": np.int32(start),
    "caption": shapes_world.caption(scene),
    "position": states.position.astype(np.float32),
    "velocity": states.velocity.astype(np.float32),
    "colour": states.colour,
    "shape": states.shape,
    "background": np.int32(states.background),
  }


def recipe(world: WorldConfig, clips: int, seed: int) -> dict[str, Any]:
  """Returns what a data set is made from, as JSON values."""
  return {"kind": "shapes clips", **to_json(world), "clips": clips, "seed": seed}


def prepare(directory: str | os.PathLike, world: WorldConfig, clips: int, seed: int) -> None:
  """Writes `clips` clips of the train split; does nothing if they are complete, else starts over.

  Clip i depends on (seed, i) and the world alone. A record holds, for n shapes:

  video      uint8 [f, H, W, 3]
  start      int32 [], the frame of its video at which the clip begins
  caption    text
  position   float32 [f, n, 2], x y of the centres, pixels
  velocity   float32 [f, n, 2], pixels per frame
  colour     int32 [n], index into shapes_world.COLOURS
  shape      int32 [n], index into shapes_world.SHAPES
  background int32 [], index into shapes_world.BACKGROUNDS

  Raises:
    UserError: clips < 1, or the directory holds clips of another world, count or seed.
  """
  if clips < 1:
    raise UserError(f"data of {clips} clips asked for; use at least 1")
  made_from = recipe(world, clips, seed)
  tfds_builder.check_recipe(directory, made_from)
  if tfds_builder.is_complete(directory):
    return
  tfds_builder.write_recipe(directory, made_from)
  f, n = world.frames, world.shapes_per_clip
  features = {
    "video": tfds_builder.tensor((f, world.size, world.size, 3), np.uint8),
    "start": tfds_builder.tensor((), np.int32),
    "caption": tfds.features.Text(),
    "position": tfds_builder.tensor((f, n, 2), np.float32),
    "velocity": tfds_builder.tensor((f, n, 2), np.float32),
    "colour": tfds_builder.tensor((n,), np.int32),
    "shape": tfds_builder.tensor((n,), np.int32),
    "background": tfds_builder.tensor((), np.int32),
  }
  tfds_builder.build(
    directory,
    f"shapes_clips/{world.difficulty}",
    features,
    (make_clip(world, seed, index) for index in range(clips)),
    count=clips,
    example_bytes=f * world.size**2 * 3,
  )
