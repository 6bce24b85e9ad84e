"""Which frames a section's context holds, by similarity instead of by time (FramePack v3, Eq. 3-5).

    sim_cos(F_i)  = mean over pixels p of the cosine of F_i,p and X_p      (the paper: their sum)
    sim_time(F_i) = exp(-(seconds from F_i to X)^2)
    sim_hybrid    = sim_cos + time_weight sim_time

The paper sorts all of the history by sim_hybrid to the next section X, and packs it in that order:
a place that is visited again finds the frames that show it, however long ago. It says neither what
X is while nothing of the section is known, nor how the sorted frames lie in a kernel, nor the
time's weight. Here:

    X is the frame next to the section, on each side of it by itself: the last one before it, the
    first one behind it. So that one is always its own best match, at full size.
    Of the candidates on a side (all that is made, but for what the groups beyond an x hold) the
    group next to the section takes the most similar ones, the next group the next ones; what is
    left is the tail.
    Inside of a group frames lie in time's order, and their indices are their own times: a kernel
    joins frames that are neighbours in time, and where time alone decides, this is the schedule
    that is not sorted.
"""

import jax
import jax.numpy as jnp

from hiar_jax.packing.rows import History, Row, Tail
from hiar_jax.packing.schedule import Group, Schedule
from hiar_jax.types import Array, Video


def choose(schedule: Schedule, history: History, video: Video, row: Row) -> Row:
  """Returns a row whose context and tails are chosen of row.candidates, for each example [b count];
  the row itself where its frames are chosen by time.

  video: clean latents [b f h w c]; frames that are no candidates may hold anything.
  """
  if not row.candidates:
    return row
  first, behind = len(schedule.start), len(row.context) - len(schedule.end)
  middle = first + len(schedule.before)
  context, indices = list(row.context), list(row.context_indices)
  tails = list(row.tails)
  sides = (
    (slice(first, middle), schedule.before, schedule.before_tail, True),
    (slice(middle, behind), schedule.after, schedule.after_tail, False),
  )
  for side, (places, groups, kind, past) in enumerate(sides):
    if not groups:
      continue
    free = jnp.broadcast_to(
      jnp.asarray(row.candidates[side]), (len(video), row.candidates[side].shape[-1])
    )
    ranked = _ranked(history, video, free > 0, past)
    slots = indices[places]
    context[places], indices[places] = _filled(groups, ranked, slots, past)
    if tails[side] is not None:
      used = sum(group.frames for group in groups)
      tails[side] = _rest(kind, tails[side], ranked[:, used:], free.shape[-1])
  return row._replace(context=tuple(context), context_indices=tuple(indices), tails=tuple(tails))


def _ranked(history: History, video: Video, free: Array, past: bool) -> Array:
  """Returns the free frames of a side, the most similar one first, then -1: [b m].

  free: bool [b m], of the video's first m frames. past: whether the section lies behind them.
  """
  frames = free.shape[1]
  number = jnp.arange(frames)
  # the frame next to the section; where there is none, nothing is free and any will do
  near = jnp.where(free, number[None], -1).max(1) if past else jnp.argmax(free, axis=1)
  near = jnp.maximum(near, 0)
  pixels = jnp.where(free[:, :, None, None, None], video[:, :frames], 0.0)
  norm = jnp.sqrt((pixels * pixels).sum(-1, keepdims=True))
  unit = pixels / jnp.maximum(norm, 1e-6)
  nearest = jax.vmap(lambda clip, at: clip[at])(unit, near)
  likeness = (unit * nearest[:, None]).sum(-1).mean(axis=(2, 3))
  seconds = (number[None] - near[:, None]) * history.frame_seconds
  score = likeness + history.time_weight * jnp.exp(-(seconds**2))
  score = jnp.where(free, score, -jnp.inf)
  if past:  # of equals the one that is nearer in time comes first
    order = frames - 1 - jnp.argsort(-score[:, ::-1], axis=1)
  else:
    order = jnp.argsort(-score, axis=1)
  return jnp.where(jnp.take_along_axis(free, order, axis=1), order, -1)


def _filled(
  groups: tuple[Group, ...], ranked: Array, slots: list[Array], past: bool
) -> tuple[list[Array], list[Array]]:
  """Returns (numbers, indices) of each group of a side, in time's order, each [b frames].

  slots: the indices of frames that are not there.
  """
  total = sum(group.frames for group in groups)
  ranked = jnp.pad(
    ranked[:, :total], ((0, 0), (0, max(total - ranked.shape[1], 0))), constant_values=-1
  )
  found, at = [], 0
  for group, slot in zip(
    groups[::-1] if past else groups, slots[::-1] if past else slots, strict=True
  ):
    chosen = _in_time(ranked[:, at : at + group.frames], past)
    at += group.frames
    own = jnp.broadcast_to(jnp.asarray(slot), chosen.shape)
    found.append((chosen, jnp.where(chosen >= 0, chosen, own)))
  numbers, indices = zip(*(found[::-1] if past else found), strict=True)
  return list(numbers), list(indices)


def _in_time(numbers: Array, past: bool) -> Array:
  """Returns numbers [b k] in time's order, -1 where the farthest would be: first in the past."""
  if past:
    return jnp.sort(numbers, axis=1)
  last = jnp.iinfo(numbers.dtype).max
  numbers = jnp.sort(jnp.where(numbers < 0, last, numbers), axis=1)
  return jnp.where(numbers == last, -1, numbers)


def _rest(kind: str, tail: Tail, rest: Array, frames: int) -> Tail:
  """Returns the tail of the frames that no group took; rest: [b r], -1 where there is none."""
  if kind == "ta":
    # as many as the plan says: those that are there stand in front
    numbers = jnp.sort(rest[:, : tail.frames.shape[-1]], axis=1)
    return Tail(numbers, numbers)
  inside = (rest[:, :, None] == jnp.arange(frames)[None, None]).any(1)
  count = inside.sum(1, keepdims=True)
  # the middle one: as many lie before it as in a list of numbers before its middle
  middle = jnp.argmax(jnp.cumsum(inside, axis=1) > count // 2, axis=1)
  return Tail(inside.astype(jnp.int32), middle[:, None].astype(jnp.int32))
