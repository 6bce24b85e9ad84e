"""A section and its packed context as the groups of a forward, in training and in sampling.

What a step makes and reads is a `Row` of frame numbers (packing.orders says which). Rows are
arrays: a training step draws one per example, a sampler scans over them. Tails that are kept are
not in them (packing.history has those of one step).
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import one_of
from hiar_jax.models.dit_packed import projection_of
from hiar_jax.models.frames import Frames
from hiar_jax.packing.orders import Step
from hiar_jax.packing.schedule import Schedule
from hiar_jax.types import Array, Block, Video

HISTORY_LEVELS = ("section", "clean")


class Row(NamedTuple):
  """What a step makes and reads, each [..., count] int: one row, one for each example, or a table.

  sections: numbers of the sections that it makes. generates, indices: their frames in the video,
  their frame indices for the rotations. context, context_indices: the same of each packed group; -1
  in `context` is a frame that is not there.
  """

  sections: Array
  generates: Array
  indices: Array
  context: tuple[Array, ...]
  context_indices: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class History:
  """How packed history shows itself.

  level: noise level of the history's tokens: the section's (FramePack), or `clean`, sigma 0
    (Helios).
  hears: whether the history's tokens attend to the text (FramePack: yes; Helios: no).
  """

  level: str = "section"
  hears: bool = True

  def __post_init__(self):
    one_of(HISTORY_LEVELS, level=self.level)


def tables(steps: Sequence[Step]) -> list[Row]:
  """Returns the steps as tables, one for each run of steps that make equally many sections.

  Each array is [steps, count]; the steps keep their order.
  """
  found: list[list[Row]] = []
  for step in steps:
    row = Row(
      np.asarray(step.sections, np.int32),
      step.generates,
      step.indices,
      step.context,
      # where nothing is, an index may be below 0, which no table of places holds
      tuple(np.maximum(indices, 0) for indices in step.context_indices),
    )
    if not found or len(found[-1][0].sections) != len(row.sections):
      found.append([])
    found[-1].append(row)
  return [jax.tree.map(lambda *x: np.stack(x).astype(np.int32), *rows) for rows in found]


def groups_of_row(
  schedule: Schedule, history: History, video: Video, row: Row, x: Block, sigma
) -> tuple[Frames, ...]:
  """Returns the context's packed groups, in the schedule's order, then the noisy section.

  video: clean latents; what of it is made is read, the rest may hold anything. row: [count] or
  [b count]. x: the section [b k h w c] at sigma, a scalar or [b]. Frames that are not there are
  zeros, and attended (as published).
  """
  shown = jnp.zeros_like(jnp.asarray(sigma)) if history.level == "clean" else sigma
  text = 0 if history.hears else None
  packed = [
    Frames(frames_at(video, numbers), shown, indices, text=text, projection=projection_of(g.pool))
    for g, numbers, indices in zip(schedule.groups, row.context, row.context_indices, strict=True)
  ]
  return (*packed, Frames(x, sigma, row.indices))


def frames_at(video: Video, numbers: Array) -> Block:
  """Returns the frames `numbers`, [k] or [b k], of a video: [b k h w c], zeros where -1."""
  numbers = jnp.broadcast_to(jnp.asarray(numbers), (video.shape[0], numbers.shape[-1]))
  there = (numbers >= 0)[:, :, None, None, None]
  frames = jax.vmap(lambda clip, at: clip[at])(video, jnp.maximum(numbers, 0))
  # not a product: 0 * NaN of a frame that is not made yet would be NaN
  return jnp.where(there, frames, jnp.zeros((), video.dtype))
