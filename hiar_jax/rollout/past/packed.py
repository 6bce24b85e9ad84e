"""The past as a ring and, of frames that have left the window, packed history.

A block sees the window's frames as K/V in the ring, and older ones as tokens by larger kernels
(FramePack, arXiv 2504.12626), so it sees the whole video so far in a fixed number of tokens:

    history.packing = tc_f16k4f2k2f6k1_g3, before block n:

    frames     ... tail, one mean ... | 16 by k4 | 2 by k2 | 6 in the ring | block n

The packed tokens are made of the latents that the blocks showed as context (hiar_jax.context), at
their noise level, in the forward that reads them: they hear no text and see each other alone.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.method import Method, MethodConfig
from hiar_jax.models.dit_packed import projection_of
from hiar_jax.models.frames import KV, Frames, Network, frame_levels
from hiar_jax.packing.rows import frames_at, sum_at
from hiar_jax.packing.schedule import Schedule, parse
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.types import Array, Block, LatentShape, Video


def schedule_of(method: MethodConfig) -> Schedule:
  """Returns the schedule of a method with a packed past.

  Raises UserError where it does not fit block and window, or asks for what a causal past has not.
  """
  schedule, window = parse(method.packing), method.window - method.block
  *far, last = schedule.before or (None,)
  wrong = f"history.packing = {method.packing!r}"
  if schedule.start or schedule.after or schedule.end or schedule.discretised:
    raise UserError(
      f"{wrong}: a causal model sees frames before a block alone: no x, nothing after"
    )
  if schedule.before_tail == "ta":
    raise UserError(f"{wrong}: expected td or tc; appended frames would grow without end")
  if not far or (last.frames, last.pool) != (window, 1) or schedule.generate != method.block:
    raise UserError(
      f"{wrong} with history.block = {method.block}, window = {method.window}: expected packed "
      f"groups, then the window's past frames and a block, as tc_f16k4f2k2f{window}k1_g"
      f"{method.block}"
    )
  if window < method.block or method.sink:
    raise UserError(
      f"{wrong}: expected history.window of at least two blocks, and no history.sink: the packed "
      "history takes its place"
    )
  return schedule


@flax.struct.dataclass
class Shown:
  """What frames showed as context: latents [b n h w c] at levels sigma [b n], of `positions` [n],
  -1 where nothing is; frame p lies at p modulo n.
  """

  latents: Video
  sigma: jax.Array
  positions: Array


@flax.struct.dataclass
class Tail:
  """Sums over frames that Shown has dropped: latents [b h w c], sigma [b], and their number."""

  latents: jax.Array
  sigma: jax.Array
  count: jax.Array


def packed_groups(
  schedule: Schedule, first, shown: Shown, tail: Tail | None = None
) -> tuple[Frames, ...]:
  """Returns the packed history of a block whose first frame is `first`, which may be traced.

  A group has the mean level of its frames. Frames that are not there are zeros in their kernel, and
  a kernel without any is not seen. tail: of older frames than those in `shown`. Groups without any
  frame are left out where that is known while the program is traced.
  """
  # the last group is the window's, which is in the ring
  numbers = [first + offsets for offsets in schedule.numbers(0, 0)[:-1]]
  made = []
  if schedule.before_tail == "tc":
    made.append(_compressed(schedule.before[0].pool, numbers[0][0], shown, tail))
  for group, frames in zip(schedule.before, numbers, strict=False):
    slots = frames % shown.positions.shape[0]
    there = (shown.positions[slots] == frames) & (frames >= 0)
    x = frames_at(shown.latents, jnp.where(there, slots, -1))
    total = jnp.where(there[None], shown.sigma[:, slots], 0).sum(axis=1)
    sigma = total / jnp.maximum(there.sum(), 1)
    made.append(_group(group.pool, x, sigma, frames, there))
  return tuple(
    group for group in made if not isinstance(group.exists, np.ndarray) or group.exists.any()
  )


def _compressed(pool: int, end, shown: Shown, tail: Tail | None) -> Frames:
  """Returns the mean of all frames before `end` as one frame; its index is the middle one's."""
  older = (shown.positions >= 0) & (shown.positions < end)
  total, _ = sum_at(shown.latents, older)
  sigma, count = jnp.where(older[None], shown.sigma, 0).sum(axis=1), older.sum()
  if tail is not None:
    total, sigma, count = total + tail.latents[:, None], sigma + tail.sigma, count + tail.count
  mean, sigma = (x / jnp.maximum(count, 1) for x in (total, sigma))
  return _group(pool, mean, sigma, end[None] // 2, count[None] > 0)


def _group(pool: int, x: Block, sigma, frames, there) -> Frames:
  positions = jnp.maximum(frames, 0)
  return Frames(x, sigma, positions, exists=there, text=None, projection=projection_of(pool))


@flax.struct.dataclass
class PackedRing(Ring):
  """A ring that also keeps what older frames showed, a fixed number of them and the sum of the
  rest.
  """

  shown: Shown
  tail: Tail

  @staticmethod
  def check(method: MethodConfig) -> None:
    schedule_of(method)

  @staticmethod
  def pools(method: MethodConfig) -> tuple[int, ...]:
    return tuple(sorted({group.pool for group in schedule_of(method).before[:-1]}))

  @classmethod
  def empty(
    cls, network: Network, method: Method, shape: LatentShape, batch: int, latents: bool = False
  ) -> "PackedRing":
    ring = Ring.empty(network, method, shape, batch, latents)
    # As many as the schedule names behind the oldest block of the ring, whose K/V may have to be
    # computed again (rollout.tick.recache); the window, and one block that is being written.
    slots = schedule_of(method).history + method.window + method.block
    one = dataclasses.replace(shape, frames=1).clip
    return cls(
      ring.kv,
      ring.positions,
      ring.latents,
      method,
      Shown(
        jnp.zeros((batch, *shape.block(slots))),
        jnp.zeros((batch, slots)),
        jnp.full(slots, -1, jnp.int32),
      ),
      Tail(jnp.zeros((batch, *one[1:])), jnp.zeros(batch), jnp.zeros((), jnp.int32)),
    )

  @staticmethod
  def packed(method: MethodConfig, n: int, latents: Video, sigma) -> tuple[Frames, ...]:
    frames = np.arange(latents.shape[1])
    if not frames.size:
      return ()
    if jnp.ndim(sigma) == 2:  # of the whole clip, whose last block shows nothing
      sigma = sigma[:, : frames.size]
    shown = Shown(latents, frame_levels(sigma, latents), frames)
    return packed_groups(schedule_of(method), n * method.block, shown)

  def read(self, groups: tuple[Frames, ...]) -> tuple[tuple[Frames, ...], tuple[KV, ...]]:
    groups, past = super().read(groups)
    schedule, k = schedule_of(self.method), self.method.block
    firsts = [g.positions[-1] // k * k for g in groups]
    history = [packed_groups(schedule, first, self.shown, self.tail) for first in firsts]
    return tuple(g.replace(packed=p) for g, p in zip(groups, history, strict=True)), past

  def write(self, kv: KV, context: Frames, keep=True) -> "PackedRing":
    ring = super().write(kv, context, keep)
    shown, tail, count = self.shown, self.tail, self.shown.positions.shape[0]
    slots = context.positions % count
    # a block that is encoded again is written where it lies already
    held = shown.positions[slots]
    dropped = (held >= 0) & (held != context.positions) & keep
    left = frames_at(shown.latents, jnp.where(dropped, slots, -1))
    tail = Tail(
      tail.latents + left.sum(axis=1),
      tail.sigma + jnp.where(dropped[None], shown.sigma[:, slots], 0).sum(axis=1),
      tail.count + dropped.sum(),
    )
    at = jnp.where(keep, slots, count)  # out of range where nothing is kept
    shown = Shown(
      shown.latents.at[:, at].set(context.x, mode="drop"),
      shown.sigma.at[:, at].set(frame_levels(context.sigma, context.x), mode="drop"),
      shown.positions.at[at].set(context.positions, mode="drop"),
    )
    return ring.replace(shown=shown, tail=tail)
