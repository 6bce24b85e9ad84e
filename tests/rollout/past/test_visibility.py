"""Which frames a frame sees: the rule of block, window and sink, and the mask of the groups that
follow from it, against the rule asked frame by frame.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Frames, Out, Read
from hiar_jax.rollout.blocks import write_context_and_denoise
from hiar_jax.rollout.past.clip_groups import block_groups, causal_groups, clip_reads
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import visible
from tests.helpers import tiny
from tests.helpers.masked import frame_mask
from tests.helpers.plain_rollout import sees

ROWS = [
  MethodConfig(block=1, window=0),
  MethodConfig(block=3, window=0),
  MethodConfig(block=1, window=3, sink=1),
  MethodConfig(block=3, window=6),
  MethodConfig(block=2, window=5, sink=1),
  MethodConfig(block=2, window=9, sink=2),
  MethodConfig(block=3, window=3),  # no past
  MethodConfig(block=3, window=7),  # begins inside a block
  MethodConfig(block=3, window=5, sink=1),  # shorter than a block beside the sink
  MethodConfig(block=3, window=7, sink=4),  # the sink ends inside a block, and is all of the past
  MethodConfig(block=3, window=9, sink=4),
  MethodConfig(block=4, window=11, sink=5),
]


each_row = pytest.mark.parametrize(
  "row", ROWS, ids=lambda row: f"block{row.block}_window{row.window}_sink{row.sink}"
)
N = 12
POSITIONS = np.arange(N, dtype=np.int32)
X = np.zeros((1, N, 1, 1, 1), np.float32)


def table(rule) -> np.ndarray:
  return np.asarray([[rule(q, p) for p in range(N)] for q in range(N)])


def rule_tables(row: MethodConfig) -> tuple[np.ndarray, np.ndarray]:
  """(what frames see [q p], which share a block [q p])."""
  causal = table(lambda q, p: sees(q, p, row))
  return causal, table(lambda q, p: q // row.block == p // row.block)


def mask_of(groups, past_frames=()) -> np.ndarray:
  mask = frame_mask(groups, past_frames)
  frames = sum(group.x.shape[1] for group in groups)
  if mask is None:
    return np.ones((frames, sum(past_frames) + frames), bool)
  assert mask.dtype == bool
  return np.asarray(mask)


# -- the rule


@each_row
def test_past_mask_is_the_part_before_the_own_block(row):
  causal, own = rule_tables(row)
  for q in range(N):
    static = visible(row, q, POSITIONS)
    assert isinstance(static, np.ndarray)
    np.testing.assert_array_equal(static, (causal & ~own)[q])
  traced = jax.jit(jax.vmap(lambda q: visible(row, q, jnp.asarray(POSITIONS))))(POSITIONS)
  np.testing.assert_array_equal(traced, causal & ~own)


def test_masks_need_no_order_and_skip_empty_slots():
  row = MethodConfig(block=2, window=0)
  slots = jnp.asarray([4, -1, 0, 3, 5], jnp.int32)
  for query in (4, 5):
    np.testing.assert_array_equal(visible(row, query, slots), [False, False, True, True, False])


def test_masks_hold_at_frame_a_million():
  row, shift = MethodConfig(block=3, window=7, sink=1), 999_999
  traced = jax.jit(lambda q, positions: visible(row, q, positions))
  for q in range(N):
    far = traced(q + shift, POSITIONS + shift)
    near = visible(MethodConfig(block=3, window=6), q, POSITIONS)
    np.testing.assert_array_equal(far, near)


def test_reads_are_runs_of_frames_in_the_order_of_their_sources():
  row = MethodConfig(block=3, window=10, sink=4)
  sources = {m: Read(past=7 + m) for m in range(3)} | {3: Read(group=2)}
  reads = clip_reads(row, 4, sources)  # frames 12 to 14 see 0 to 3, and from 9 on
  found = [(read.past, read.group, read.frames) for read in reads]
  assert found == [(7, None, (0, 3)), (8, None, (0, 1)), (None, 2, (0, 3))]
  within = clip_reads(MethodConfig(block=6, window=13, sink=1), 1, {0: Read(group=0)})
  assert [read.frames for read in within] == [(0, 6)]
  apart = clip_reads(MethodConfig(block=6, window=8, sink=1), 1, {0: Read(group=0)})
  assert [read.frames for read in apart] == [(0, 1), (5, 6)]  # the sink, and the window's one frame


# -- the mask of a clip's groups


@each_row
def test_block_causal_mask(row):
  causal, _ = rule_tables(row)
  np.testing.assert_array_equal(mask_of(causal_groups(X, 0.5, row)), causal)


@each_row
def test_teacher_forcing_mask(row):
  """Context blocks before noisy ones, in one forward; and with the context's K/V as the past."""
  causal, own = rule_tables(row)
  k, blocks = row.block, N // row.block
  context = causal_groups(X, 0.1, row)
  noisy = block_groups(X, 0.5, row, [{m: Read(group=m) for m in range(blocks)}] * blocks)
  np.testing.assert_array_equal(
    mask_of((*context, *noisy)), np.block([[causal, np.zeros_like(causal)], [causal & ~own, own]])
  )
  kept = {m: Read(past=m) for m in range(blocks - 1)}
  noisy = block_groups(X, 0.5, row, [kept] * blocks)
  np.testing.assert_array_equal(
    mask_of(noisy, (k,) * (blocks - 1)), np.block([(causal & ~own)[:, : N - k], own])
  )


@each_row
def test_blocks_after_a_sink_see_its_clean_frames_in_place_of_the_noisy(row):
  causal, own = rule_tables(row)
  k, blocks = row.block, N // row.block
  shown = [
    {m: Read(past=m) if m < 2 <= n else Read(group=m) for m in range(blocks)} for n in range(blocks)
  ]
  mask = mask_of(block_groups(X, 0.5, row, shown), (k, k))
  clean = np.zeros((N, 2 * k), bool)
  clean[2 * k :] = causal[2 * k :, : 2 * k]
  noisy = causal.copy()
  noisy[2 * k :, : 2 * k] = False
  assert (noisy | own == noisy).all()
  np.testing.assert_array_equal(mask, np.block([clean, noisy]))


def test_blocks_of_a_clip_are_cut_and_placed():
  x, levels = tiny.video(1, 6), np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)
  groups = causal_groups(x, levels, MethodConfig(block=2, window=0))
  np.testing.assert_array_equal(np.concatenate([g.x for g in groups], axis=1), x)
  np.testing.assert_array_equal(np.concatenate([g.sigma for g in groups], axis=1), levels)
  assert np.concatenate([g.positions for g in groups]).tolist() == list(range(6))
  for sigma in (0.3, levels[:, 0]):  # a scalar, [b]
    for group in causal_groups(x, sigma, MethodConfig(block=2, window=0)):
      np.testing.assert_array_equal(group.sigma, np.asarray(sigma, np.float32))


def test_window_counts_the_block_and_keeps_the_sink():
  """Blocks of 2, a window of 5 with a sink of 1: frames 6 and 7 see the sink, the two frames
  before, and themselves.
  """
  mask = mask_of(causal_groups(X, 0.5, MethodConfig(block=2, window=5, sink=1)))
  assert np.flatnonzero(mask[6]).tolist() == np.flatnonzero(mask[7]).tolist() == [0, 4, 5, 6, 7]
  assert (mask.sum(axis=1) <= 5).all()


# -- frame_mask


def group(frames: int, *reads: Read, exists=None) -> Frames:
  return Frames(X[:, :frames], 0.5, POSITIONS[:frames], reads, exists)


def test_no_mask_where_everything_is_seen():
  assert frame_mask((group(3),), ()) is None
  assert frame_mask((group(3, Read(past=0), Read(past=1)),), (2, 4)) is None
  assert frame_mask((group(2, Read(group=1)), group(3, Read(group=0))), ()) is None
  assert frame_mask((group(2, Read(group=1)), group(3)), ()) is not None
  assert frame_mask((group(3, Read(past=0, frames=(0, 1))),), (2,)) is not None
  assert frame_mask((group(3),), (2,)) is not None


def test_a_source_read_in_two_parts_is_seen_in_both():
  groups = (group(2, Read(past=1, frames=(0, 1)), Read(past=1, frames=(3, 4))), group(1))
  expected = [[0, 0, 1, 0, 0, 1, 1, 1, 0]] * 2 + [[0] * 8 + [1]]
  np.testing.assert_array_equal(mask_of(groups, (2, 4)), np.asarray(expected, bool))


@each_row
def test_frames_that_do_not_exist_are_seen_by_none_that_do(row):
  """Whether which ones these are is known while the program is traced, or not."""
  causal, _ = rule_tables(row)
  exists = np.random.default_rng(3).random(N) < 0.6
  groups = causal_groups(X, 0.5, row)
  parts = np.split(exists, len(groups))
  groups = [g.replace(exists=part) for g, part in zip(groups, parts, strict=True)]
  groups[1] = groups[1].replace(exists=None)  # all are there
  exists[row.block : 2 * row.block] = True
  mask = np.asarray(jax.jit(lambda groups: frame_mask(groups, ()))(tuple(groups)))
  # what the others see is of no account; they see something
  np.testing.assert_array_equal(mask[exists], (causal & exists)[exists])
  assert mask.any(axis=1).all()
  np.testing.assert_array_equal(mask_of(tuple(groups))[exists], mask[exists])


# -- rings


def held_before(row: MethodConfig, n: int) -> np.ndarray:
  """The frames that a ring's slots may hold before block n: empty ones, frames of all ages."""
  slots = np.full(N, -1, np.int32)
  slots[: n * row.block] = np.random.default_rng(n).permutation(n * row.block)
  return np.roll(slots, 3)


def brute_force(row: MethodConfig, frames, slots) -> np.ndarray:
  return np.asarray([[p >= 0 and bool(sees(q, p, row)) for p in slots] for q in frames])


@each_row
def test_a_group_reads_the_slots_that_its_block_sees(row):
  @jax.jit
  def mask(slots, frames):
    ring = Ring(None, slots, None, row.at((1.0, 0.0)))
    groups, past = ring.read((Frames(X[:, : row.block], 0.5, frames),))
    assert past == (None,)
    return frame_mask(groups, (N,))

  for n in range(1, N // row.block):
    slots, frames = held_before(row, n), n * row.block + np.arange(row.block)
    expected = np.block([brute_force(row, frames, slots), np.ones((row.block, row.block), bool)])
    np.testing.assert_array_equal(mask(slots, frames), expected)


@pytest.mark.parametrize("there", [None, True, False])
@each_row
def test_the_pair_of_one_forward(row, there):
  """[context of block n | noisy block n + 1]: the context as if it were in the past already."""
  k = row.block

  @jax.jit
  def mask(slots, frames, exists):
    masks = []

    def bound(groups, past):
      masks.append(frame_mask(groups, (N,)))
      return Out((None, None), (None, None))

    context = Frames(X[:, :k], 0.2, frames, exists=exists)
    noisy = Frames(X[:, :k], 0.5, frames + k)
    ring = WithoutWrites(None, slots, None, row.at((1.0, 0.0)))
    write_context_and_denoise(bound, ring, context, noisy)
    return masks.pop()

  for n in range(1, N // k - 1):
    slots = held_before(row, n)
    frames = n * k + np.arange(k)
    seen = np.zeros((k, k), bool) if there is False else brute_force(row, frames + k, frames)
    expected = np.block(
      [
        [brute_force(row, frames, slots), np.ones((k, k), bool), np.zeros((k, k), bool)],
        [brute_force(row, frames + k, slots), seen, np.ones((k, k), bool)],
      ]
    )
    # what a context sees that is not there is of no account
    accounted = slice(k if there is False else 0, None)
    found = mask(slots, frames, None if there is None else np.full(k, there))
    np.testing.assert_array_equal(np.asarray(found)[accounted], expected[accounted])


class WithoutWrites(Ring):
  def write(self, kv, latents, positions, keep=True):
    return self
