"""The past of a packed video that is made in time's order: the frames that its next section may
see, and no others, however long the video is.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.packing.orders import counted_on
from hiar_jax.packing.rows import Row, Tail
from hiar_jax.packing.schedule import Schedule
from hiar_jax.types import Block, Video


@flax.struct.dataclass
class PackedPast:
  """What history shows of a video's `frames` first frames, of which `sections` sections were made.

  latents: [b slots h w c], the video's first frames (of the groups beyond an x), of a compressed
    tail the mean of its frames, and the last frames (of the groups next to the section); zeros
    where none is.
  frames, sections: int32 scalars. seed: [b], of the noise.
  """

  latents: Video
  frames: np.ndarray
  sections: np.ndarray
  seed: jax.Array


def slots(schedule: Schedule) -> tuple[int, int, int]:
  """Returns the slots of the video's first frames, of a tail's mean (0 or 1), and of the last ones.

  Raises ValueError for a schedule whose past has no fixed size, or none that lies before a section.
  """
  tail = schedule.before_tail
  if tail == "ta":
    raise ValueError(f"{schedule.notation}: an appended tail grows with the video")
  first, last = (sum(g.frames for g in groups) for groups in (schedule.start, schedule.before))
  return first, int(tail == "tc"), last


def empty(schedule: Schedule, seed: jax.Array, frame: tuple[int, int, int]) -> PackedPast:
  """Returns the past of a video that has not begun. seed: [b]. frame: the shape [h w c]."""
  zero = np.zeros((), np.int32)
  return PackedPast(jnp.zeros((len(seed), sum(slots(schedule)), *frame)), zero, zero, seed)


def extended(schedule: Schedule, latents: Video, frames, part: Block) -> Video:
  """Returns PackedPast.latents after the next frames of the video, [b k h w c] as history shows
  them. frames: those before them, an int32 scalar. Traced.
  """
  first, tail, last = slots(schedule)
  k = part.shape[1]
  start, mean, recent = jnp.split(latents, (first, first + tail), axis=1)
  at = jnp.arange(first) - frames
  is_new = ((at >= 0) & (at < k))[None, :, None, None, None]
  start = jnp.where(is_new, part[:, jnp.clip(at, 0, k - 1)], start)
  line = jnp.concatenate([recent, part], axis=1)
  if tail:
    # the frames that leave the last ones join the mean, but for those that a group beyond the x has
    joins = frames - last + jnp.arange(k) >= first
    left = jnp.where(joins[None, :, None, None, None], line[:, :k], 0.0)
    count = jnp.maximum(frames + k - last - first, 1)
    total = left.sum(axis=1, keepdims=True) - joins.sum() * mean
    mean = mean + total / count
  return jnp.concatenate([start, mean, line[:, k:]], axis=1)


def row_of(schedule: Schedule, past: PackedPast, *, published: bool = False) -> Row:
  """Returns the row of the next section, whose context is slots of the past's latents: that of
  packing.orders.plan in vanilla order, but for the places where the frames are.

  published: as packing.orders.plan.
  """
  first, tail, last = slots(schedule)
  frames, width = int(past.frames), schedule.generate
  numbers = schedule.numbers(frames, frames + width)
  indices = np.arange(frames, frames + width), numbers
  if published:
    indices = counted_on(schedule, 0)
  context = []
  for i, group in enumerate(numbers):
    place = group if i < len(schedule.start) else group - frames + first + tail + last
    context.append(np.where((group >= 0) & (group < frames), place, -1))
  mean = None
  beyond = frames - last - first
  if tail and beyond > 0:
    inside = np.arange(first + tail + last) == first
    mean = Tail(inside, np.asarray([first + beyond // 2]))
  row = Row(
    np.asarray([past.sections]),
    np.arange(frames, frames + width),
    indices[0],
    tuple(context),
    tuple(np.maximum(group, 0) for group in indices[1]),
    (mean, None),
  )
  return jax.tree.map(lambda x: np.asarray(x, np.int32), row)
