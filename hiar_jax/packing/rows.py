"""A section and its packed context as the groups of a forward, in training and in sampling.

What a step makes and reads is a `Row` of frame numbers (packing.orders says which). Rows are
arrays: a training step draws one per example, a sampler scans over them. Beside each group of the
schedule stands a group for each tail that is kept and has frames, in the order of time:

    tc   one frame, the mean of the tail's, under the kernel of the group next to it. Its index is
         the middle one of the tail's (the paper names none).
    ta   one token a frame: each is averaged to one pixel, which fills a kernel of the group next to
         it. Its place is that of the first kernel of its frame. So the tokens grow with the tail,
         and steps with tails of other lengths are tables, and programs, of their own.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import at_least, one_of
from hiar_jax.models.dit_packed import projection_of
from hiar_jax.models.frames import Frames
from hiar_jax.packing.orders import Step
from hiar_jax.packing.schedule import Schedule
from hiar_jax.types import Array, Block, Video

HISTORY_LEVELS = ("section", "clean")
SORTS = ("time", "similarity")


class Tail(NamedTuple):
  """A tail that is kept, and has frames.

  frames: of ta their numbers [..., n], -1 where there is none; of tc [..., m] 1 for each of the
  video's first m frames that lies in it, else 0. indices: frame indices, [..., n] or [..., 1].
  """

  frames: Array
  indices: Array


class Row(NamedTuple):
  """What a step makes and reads, each [..., count] int: one row, one for each example, or a table.

  sections: numbers of the sections that it makes. generates, indices: their frames in the video,
  their frame indices for the rotations. context, context_indices: the same of each packed group; -1
  in `context` is a frame that is not there. tails: before the section and behind it; None: none.
  candidates: of the same sides, [..., m] 1 for each of the video's first m frames that the groups
  may hold; (): frames are chosen by time, and stand in `context` already.
  """

  sections: Array
  generates: Array
  indices: Array
  context: tuple[Array, ...]
  context_indices: tuple[Array, ...]
  tails: tuple[Tail | None, Tail | None] = (None, None)
  candidates: tuple[Array, ...] = ()

  def later(self, frames: Array) -> "Row":
    """Returns the row with all frame indices of each example moved on by `frames` [b]."""
    tails = (tail and tail._replace(indices=tail.indices + frames[:, None]) for tail in self.tails)
    return self._replace(
      indices=self.indices + frames[:, None],
      context_indices=tuple(indices + frames[:, None] for indices in self.context_indices),
      tails=tuple(tails),
    )


@dataclasses.dataclass(frozen=True)
class History:
  """How packed history shows itself.

  level: noise level of the history's tokens: the section's (FramePack), or `clean`, sigma 0
    (Helios).
  hears: whether the history's tokens attend to the text (FramePack: yes; Helios: no).
  sort: which frames are the nearest to the section, by `time` or by `similarity`
    (packing.similarity). time_weight, frame_seconds: of the similarity: lambda_time of Eq. 5, and
    the seconds from one latent frame to the next.
  """

  level: str = "section"
  hears: bool = True
  sort: str = "time"
  time_weight: float = 1.0
  frame_seconds: float = 0.125

  def __post_init__(self):
    one_of(HISTORY_LEVELS, level=self.level)
    one_of(SORTS, sort=self.sort)
    at_least(0, time_weight=self.time_weight, frame_seconds=self.frame_seconds)

  @property
  def similar(self) -> bool:
    return self.sort == "similarity"


def tables(steps: Sequence[Step], *, ordered: bool = True) -> list[Row]:
  """Returns the steps as tables, one for each run of steps that are alike in shape: that make
  equally many sections, from tails that are equally long where they are appended.

  Each array is [steps, count]; the steps keep their order. ordered: False puts all steps of a shape
  into one table, wherever they stand.
  """
  found = [x for step in steps for x in (*step.tails, *(step.candidates or ()))]
  frames = 1 + max((int(x.max()) for x in found if x.size), default=0)
  rows = [_row(step, frames) for step in steps]
  if not ordered:
    shapes = list(dict.fromkeys(map(_shape, rows)))
    rows.sort(key=lambda row: shapes.index(_shape(row)))
  return [
    jax.tree.map(lambda *x: np.stack(x).astype(np.int32), *alike)
    for _, alike in itertools.groupby(rows, _shape)
  ]


def _shape(row: Row) -> tuple:
  leaves, structure = jax.tree.flatten(row)
  return structure, tuple(np.shape(leaf) for leaf in leaves)


def _row(step: Step, frames: int) -> Row:
  """Returns the row of a step; frames: of the video that a tail or a choice may hold."""
  tails = []
  for kind, tail in zip(step.tail_kinds, step.tails, strict=True):
    found = None
    if tail.size and kind == "tc":
      found = Tail(np.isin(np.arange(frames), tail), tail[[tail.size // 2]])
    elif tail.size:
      found = Tail(tail, tail)
    tails.append(found)
  return Row(
    np.asarray(step.sections, np.int32),
    step.generates,
    step.indices,
    step.context,
    # where nothing is, an index may be below 0, which no table of places holds
    tuple(np.maximum(indices, 0) for indices in step.context_indices),
    tuple(tails),
    tuple(np.isin(np.arange(frames), side) for side in step.candidates or ()),
  )


def groups_of_row(
  schedule: Schedule,
  history: History,
  video: Video,
  row: Row,
  x: Block,
  sigma,
  *,
  patch: tuple[int, int, int] | None = None,
) -> tuple[Frames, ...]:
  """Returns the context's packed groups, in the order of time, then the noisy section.

  video: clean latents; what of it is made is read, the rest may hold anything. row: [count] or
  [b count]. x: the section [b k h w c] at sigma, a scalar or [b]. patch: of the network; only an
  appended tail needs it. Frames that are not there are zeros, and attended (as published); a tail
  that is not there makes no tokens.
  """
  shown = jnp.zeros_like(jnp.asarray(sigma)) if history.level == "clean" else sigma
  text = 0 if history.hears else None
  parts = [
    (group.pool, frames_at(video, numbers), indices)
    for group, numbers, indices in zip(
      schedule.groups, row.context, row.context_indices, strict=True
    )
  ]
  before, after = row.tails
  # the later one first, so that the other's place stays
  if after is not None:
    pool = schedule.after[-1].pool
    made = _tail(schedule.after_tail, pool, video, after, patch)
    parts.insert(len(parts) - len(schedule.end), made)
  if before is not None:
    pool = schedule.before[0].pool
    made = _tail(schedule.before_tail, pool, video, before, patch)
    parts.insert(len(schedule.start), made)
  packed = [
    Frames(latents, shown, indices, text=text, projection=projection_of(pool))
    for pool, latents, indices in parts
  ]
  return (*packed, Frames(x, sigma, row.indices))


def _tail(
  kind: str, pool: int, video: Video, tail: Tail, patch: tuple[int, int, int] | None
) -> tuple[int, Block, Array]:
  """Returns (pool, latents, frame indices) of a tail. Raises ValueError for ta without a patch."""
  if kind == "tc":
    total, count = sum_at(video, tail.frames)
    return pool, total / count, tail.indices
  if patch is None:
    raise ValueError("an appended tail (ta) is cut for the network's patches: give `patch`")
  x, (_, ph, pw) = frames_at(video, tail.frames), patch
  b, n, _, _, c = x.shape
  pixels = jnp.repeat(x.mean(axis=(2, 3), keepdims=True), pool, axis=1)
  filled = jnp.broadcast_to(pixels, (b, n * pool, pool * ph, pool * pw, c))
  return pool, filled, jnp.repeat(jnp.asarray(tail.indices), pool, axis=-1)


def sum_at(video: Video, inside: Array) -> tuple[Block, Array]:
  """Returns the sum [b 1 h w c] of the frames where `inside`, [m] or [b m], is 1, and their number
  [b 1 1 1 1].
  """
  inside = jnp.broadcast_to(jnp.asarray(inside), (video.shape[0], inside.shape[-1]))
  chosen = inside[:, :, None, None, None] > 0
  x = jnp.where(chosen, video[:, : inside.shape[-1]], jnp.zeros((), video.dtype))  # as frames_at
  return x.sum(axis=1, keepdims=True), chosen.sum(axis=1, keepdims=True).astype(x.dtype)


def frames_at(video: Video, numbers: Array) -> Block:
  """Returns the frames `numbers`, [k] or [b k], of a video: [b k h w c], zeros where -1."""
  numbers = jnp.broadcast_to(jnp.asarray(numbers), (video.shape[0], numbers.shape[-1]))
  there = (numbers >= 0)[:, :, None, None, None]
  frames = jax.vmap(lambda clip, at: clip[at])(video, jnp.maximum(numbers, 0))
  # not a product: 0 * NaN of a frame that is not made yet would be NaN
  return jnp.where(there, frames, jnp.zeros((), video.dtype))
