"""The ring of K/V: what it keeps of blocks that are written, and a sink that moves along with the
window. Which slots a block needs and sees is in test_rollout and test_visibility.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models import dit, rope
from hiar_jax.models.frames import Frames
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import block_positions
from tests.helpers import tiny
from tests.helpers.plain_rollout import assert_same

ROWS = [
  MethodConfig(block=1, window=3, sink=1),
  MethodConfig(block=2, window=5, sink=1),
  MethodConfig(block=2, window=7, sink=5),
  MethodConfig(block=3, window=5, sink=1),
  MethodConfig(block=3, window=7),
  MethodConfig(block=3, window=11, sink=2),
]
each_row = pytest.mark.parametrize(
  "row", ROWS, ids=lambda row: f"block{row.block}_window{row.window}_sink{row.sink}"
)
BLOCKS = 10


def frame_numbers(frames) -> tuple[dit.KV, np.ndarray]:
  """(K/V, latents) of frames that hold the frame's number everywhere."""
  numbers = np.asarray(frames, np.float32)
  kv = tiny.CONFIG.empty_kv(len(numbers), tiny.BATCH, tiny.HEIGHT, tiny.WIDTH)
  kv, latents = jax.tree.map(np.zeros_like, (kv, tiny.video(0, len(numbers))))
  kv = jax.tree.map(lambda leaf: leaf + numbers.reshape(-1, 1, 1, 1), kv)
  return kv, latents + numbers.reshape(-1, 1, 1, 1)


@functools.cache
def written(row: MethodConfig, blocks: int, *, latents: bool = True) -> Ring:
  if not blocks:
    shape = tiny.shape(BLOCKS * row.block)
    return Ring.empty(tiny.CONFIG, row.at(tiny.SIGMAS), shape, tiny.BATCH, latents=latents)
  frames = (blocks - 1) * row.block + np.arange(row.block)
  past = written(row, blocks - 1, latents=latents)
  kv, x = frame_numbers(frames)
  return write(past, kv, Frames(x, 0.0, jnp.asarray(frames)))


# compiled once for all blocks of a row
write = jax.jit(Ring.write)
blocks_before = jax.jit(Ring.blocks_before)
kept_latents = jax.jit(Ring.kept_latents)


# -- what is kept


@each_row
def test_slots_hold_the_keys_values_and_latents_of_their_frames(row):
  past = written(row, BLOCKS)
  frames = np.asarray(past.positions)
  assert (frames >= 0).all()
  kv, latents = frame_numbers(frames)
  jax.tree.map(np.testing.assert_array_equal, (past.kv, past.latents), (kv, latents))


def test_latents_are_kept_where_they_are_wanted():
  past = written(ROWS[1], 4, latents=False)
  assert past.latents is None and (past.positions >= 0).all()


@pytest.mark.parametrize("keep", [False, [True, False], [False, True]], ids=str)
def test_frames_that_are_not_to_be_kept_change_nothing(keep):
  row, frames = ROWS[1], np.asarray([8, 9])
  before = written(row, 4)
  kv, x = frame_numbers(frames)
  after = before.write(kv, Frames(x, 0.0, jnp.asarray(frames)), jnp.asarray(keep))
  kept = frames[np.broadcast_to(keep, 2)]
  everywhere = written(row, 5)
  old, new, all_new = (set(past.positions.tolist()) for past in (before, after, everywhere))
  assert new & set(frames.tolist()) == set(kept.tolist())
  assert old - new <= old - all_new and len(new) == len(old)
  kv, latents = frame_numbers(after.positions)
  jax.tree.map(np.testing.assert_array_equal, (after.kv, after.latents), (kv, latents))


def test_a_ring_without_slots_stays_one():
  row = MethodConfig(block=2, window=2)
  past = written(row, 3)
  assert past.slots == 0
  groups, kept = past.read((Frames(tiny.video(0, 2), 0.5, block_positions(3, past.method)),))
  assert groups[0].reads[0].seen.shape == (0,) and len(kept) == 1


# -- to compute the K/V again


@pytest.mark.parametrize("pending", [0, 1], ids=["written", "pending"])
@each_row
def test_the_blocks_before_a_block_are_all_that_slots_may_hold(row, pending):
  """pending: block n - 1 is not in the ring yet, as where a tick writes it with block n."""
  for n in range(1, BLOCKS):
    past = written(row, n - pending)
    order, counts = blocks_before(past, n)
    counted = np.asarray(order)[np.asarray(counts)].tolist()
    assert counted == sorted(set(counted))  # oldest first, none twice
    positions = np.asarray(past.positions)
    assert set((positions[positions >= 0] // row.block).tolist()) <= set(counted)


@each_row
def test_kept_latents_are_those_of_the_block_and_say_which_are_there(row):
  past = written(row, BLOCKS - 1)
  for n in range(BLOCKS + 2):
    frames = n * row.block + np.arange(row.block)
    latents, held = kept_latents(past, frames)
    np.testing.assert_array_equal(held, np.isin(frames, past.positions))
    _, expected = frame_numbers(frames)
    assert latents.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(latents)[:, held], expected[:, held])


def test_an_emptied_ring_holds_nothing():
  past = written(ROWS[1], 4)
  emptied = past.emptied()
  assert (emptied.positions == -1).all() and emptied.slots == past.slots
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(emptied.kv))
  assert emptied.latents is None


# -- a sink at relative positions


def test_turned_keys_are_those_of_frames_further_on():
  keys, far = tiny.random(3, 2, 1, 3, 4, 2, 12), 700_000_001
  at = lambda positions: rope.rotation(jnp.asarray(positions), 2, 2, 12)
  here, there = at([0, 1, 2]), at([far, far + 1, far + 2])
  rotate = lambda rotation: jnp.stack([rope.apply(layer, *rotation) for layer in keys])
  kv = dit.KV(rotate(here), jnp.asarray(keys)).moved(jnp.asarray(far))
  assert_same(kv.k, rotate(there))
  np.testing.assert_array_equal(kv.v, keys)  # values hold no position


@dataclasses.dataclass(frozen=True)
class Moved:
  """K/V of slots that know how far they were moved."""

  slots: tuple[int, ...]
  distance: int = 0

  def take(self, first: int, end: int) -> "Moved":
    return Moved(self.slots[first:end], self.distance)

  def moved(self, distance) -> "Moved":
    return Moved(self.slots, self.distance + int(distance))


def test_the_sink_is_carried_as_far_as_the_window_rolls():
  method = MethodConfig(block=2, window=6, sink=2).at(tiny.SIGMAS, "relative")
  past = Ring(Moved((0, 1, 2, 3)), jnp.asarray([0, 1, -1, -1], jnp.int32), None, method)
  x = tiny.video(0, 2)

  def moved(*blocks):
    groups, kept = past.read(tuple(Frames(x, 0.5, block_positions(n, method)) for n in blocks))
    assert kept[0] == Moved((2, 3)) and [sink.slots for sink in kept[1:]] == [(0, 1)] * len(blocks)
    # each group reads the ring, and of the sinks its own
    assert [[read.past for read in group.reads] for group in groups] == [
      [0, 1 + i] for i in range(len(blocks))
    ]
    return [sink.distance for sink in kept[1:]]

  # block n ends at 2 n + 1; its window of 4 is full at n = 2
  assert [moved(n)[0] for n in range(6)] == [0, 0, 0, 2, 4, 6]
  assert moved(4, 5) == [4, 6] and moved(2, 3) == [0, 2]


@pytest.mark.parametrize("row", [ROWS[1], ROWS[5]], ids=["block2", "block3"])
def test_a_moved_sink_is_seen_by_those_who_see_one_that_stays(row):
  row = dataclasses.replace(row, window=max(row.window, 9))
  still = written(row, 7)
  moving = still.replace(method=row.at(tiny.SIGMAS, "relative"))
  groups = (Frames(tiny.video(0, row.block), 0.5, block_positions(7, still.method)),)
  (expected,), _ = still.read(groups)
  (found,), kept = moving.read(groups)
  ring_part, sink_part = found.reads
  np.testing.assert_array_equal(
    np.concatenate([sink_part.seen, ring_part.seen]), expected.reads[0].seen
  )
  assert sink_part.seen.all()
  assert kept[0].k.shape[2] == still.slots - row.sink and kept[1].k.shape[2] == row.sink
