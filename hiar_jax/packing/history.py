"""The packed groups of a section, from a video and the plan of its sections.

What a network takes beside the noisy section (models.frames): a group of frames for each group of
the schedule that has any, and one for each tail that is kept, in the order of time.

    tc   one frame, the mean of the tail's, under the kernel of the group next to it. Its index is
         the middle one of the tail's (the paper names none).
    ta   one token a frame: each is averaged to one pixel, which fills a kernel of the group next to
         it. Its place is that of the first kernel of its frame.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models.dit_packed import projection_of
from hiar_jax.models.frames import Frames, Read
from hiar_jax.packing.orders import Step
from hiar_jax.packing.schedule import Schedule
from hiar_jax.types import Video


def groups_of(
  schedule: Schedule,
  step: Step,
  video: Video,
  sigma,
  *,
  text: int | None = 0,
  patch: tuple[int, int, int] = (1, 2, 2),
  published: bool = False,
) -> tuple[Frames, ...]:
  """Returns the packed groups of a step; the noisy section stands behind them in a forward.

  video: latents [b f h w c]; only frames that step.context and step.tails name reach the result.
  sigma, text: noise level and text of the history, as in Frames. patch: of the network.
  published: frames that do not exist are zeros that are attended to, as in the published code; else
  they make no tokens. Raises UserError for zeros before the video's start: frames that do not exist
  have indices only in a plan with the published ones.
  """
  parts = []
  for group, frames, indices in zip(
    schedule.groups, step.context, step.context_indices, strict=True
  ):
    there = frames >= 0
    if published and (indices < 0).any():
      raise UserError(
        f"schedule {schedule.notation!r}: frames before the video's start have no index; zeros in "
        "their place need a plan with published = True"
      )
    if not published:
      frames, indices, there = frames[there], indices[..., there], there[there]
    # by frame, so that a long video is not copied for a few of them
    x = jnp.asarray(video[:, np.maximum(frames, 0)])
    x = jnp.where(there[None, :, None, None, None], x, 0)
    parts.append((group.pool, x, indices))
  before, after = step.tails
  behind = len(parts) - len(schedule.end)
  if after.size:
    tail = _tail(schedule.after_tail, schedule.after[-1].pool, video, after, patch)
    parts.insert(behind, tail)
  if before.size:
    tail = _tail(schedule.before_tail, schedule.before[0].pool, video, before, patch)
    parts.insert(len(schedule.start), tail)
  parts = [part for part in parts if part[1].shape[1]]
  made = []
  for i, (pool, x, indices) in enumerate(parts):
    others = tuple(Read(group=j) for j in range(len(parts) + 1) if j != i)  # the section too
    made.append(Frames(x, sigma, indices, others, text=text, projection=projection_of(pool)))
  return tuple(made)


def _tail(
  kind: str, pool: int, video: Video, frames: np.ndarray, patch: tuple[int, int, int]
) -> tuple[int, jax.Array, np.ndarray]:
  """Returns (pool, latents, frame indices) of a tail that is kept."""
  x = jnp.asarray(video[:, frames])
  if kind == "tc":
    return pool, x.mean(axis=1, keepdims=True), frames[[len(frames) // 2]]
  (b, n, _, _, c), (_, ph, pw) = x.shape, patch
  pixels = jnp.repeat(x.mean(axis=(2, 3), keepdims=True), pool, axis=1)
  filled = jnp.broadcast_to(pixels, (b, n * pool, pool * ph, pool * pw, c))
  return pool, filled, np.repeat(frames, pool)
