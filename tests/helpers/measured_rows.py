"""Rows of true clips of the shapes world, as a comparison has them."""

import functools

import numpy as np

from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.evaluation import rows, shapes_truth

PLAIN = WorldConfig()
SCREEN = WorldConfig(size=32, frames=45, shape_size=0.375, pace=0.275, hidden=12)


@functools.cache
def row(name="a, vanilla", kind="run", seed=0, world=PLAIN, frames=9, spoilt=False) -> rows.Row:
  videos, captions = shapes_truth.true_clips(world, clips=6, frames=frames, seed=seed)
  captions = [*captions[:3]] * 2  # of which the later ones are another prompt's
  if spoilt:
    videos = np.concatenate([videos[:, :4], videos[:, 3:-1] // 2], 1)
  judged = shapes_truth.judge(videos, captions, world)
  config = {"seed": seed, "data": {"frames": frames}}
  facts = dict(name=name, kind=kind, command="python -m hiar_jax.evaluate", config=config)
  return rows.of_judged(judged, **facts, settings={"seed": 1000})


def table() -> list[rows.Row]:
  return [
    row("true clips", "data", seed=5),
    row("teacher, training length", "teacher", frames=5),
    row("a, vanilla"),
    row("b, both ends", spoilt=True),
  ]
