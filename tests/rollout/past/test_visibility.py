"""Which frames a frame sees: the rule of block, window and sink as masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import Method
from hiar_jax.rollout.past.visibility import (
  block_causal_mask,
  own_block_mask,
  past_mask,
  teacher_forcing_mask,
)
from tests.helpers.plain_rollout import sees

ROWS = [
  Method(block=1, window=0),
  Method(block=3, window=0),
  Method(block=1, window=3, sink=1),
  Method(block=3, window=6),
  Method(block=2, window=5, sink=1),
  Method(block=3, window=7, sink=4),
  Method(block=2, window=9, sink=2),
]


each_row = pytest.mark.parametrize(
  "row", ROWS, ids=lambda row: f"block{row.block}_window{row.window}_sink{row.sink}"
)
N = 12
POSITIONS = jnp.arange(N, dtype=jnp.int32)


def table(rule) -> np.ndarray:
  return np.asarray([[rule(q, p) for p in range(N)] for q in range(N)])


@each_row
def test_block_causal_mask(row):
  np.testing.assert_array_equal(
    block_causal_mask(POSITIONS, row), table(lambda q, p: sees(q, p, row))
  )


@each_row
def test_past_mask_is_the_part_before_the_own_block(row):
  past = np.asarray(past_mask(POSITIONS, POSITIONS, row))
  own = np.asarray(own_block_mask(POSITIONS, POSITIONS, row))
  np.testing.assert_array_equal(own, table(lambda q, p: q // row.block == p // row.block))
  np.testing.assert_array_equal(past | own, block_causal_mask(POSITIONS, row))
  assert not (past & own).any()


@each_row
def test_teacher_forcing_mask(row):
  mask = np.asarray(teacher_forcing_mask(POSITIONS, row))
  causal = table(lambda q, p: sees(q, p, row))
  own = table(lambda q, p: q // row.block == p // row.block)
  np.testing.assert_array_equal(
    mask, np.block([[causal, np.zeros_like(causal)], [causal & ~own, own]])
  )


def test_window_counts_the_block_and_keeps_the_sink():
  """Blocks of 2, a window of 5 with a sink of 1: frames 6 and 7 see the sink, the two frames
  before, and themselves.
  """
  mask = np.asarray(block_causal_mask(POSITIONS, Method(block=2, window=5, sink=1)))
  assert np.flatnonzero(mask[6]).tolist() == np.flatnonzero(mask[7]).tolist() == [0, 4, 5, 6, 7]
  assert (mask.sum(axis=1) <= 5).all()


def test_masks_need_no_order_and_skip_empty_slots():
  row = Method(block=2, window=0)
  slots = jnp.asarray([4, -1, 0, 3, 5], jnp.int32)
  query = jnp.asarray([4, 5], jnp.int32)
  np.testing.assert_array_equal(
    past_mask(query, slots, row), [[False, False, True, True, False]] * 2
  )


def test_masks_hold_at_frame_a_million():
  row, shift = Method(block=3, window=7, sink=1), 999_999
  far = block_causal_mask(POSITIONS + shift, row)
  np.testing.assert_array_equal(far, block_causal_mask(POSITIONS, Method(block=3, window=6)))
