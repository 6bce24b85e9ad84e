"""The chunks of stored arrays: none is too large, few are in memory at once, a stack is read row by
row.
"""

import asyncio
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.checkpoints import stored_arrays, weights
from hiar_jax.conversion.key_maps import Stack
from tests.helpers.small_weights import CONFIG, PARAMS, Rows, assert_same, chunks


@pytest.mark.parametrize(
  ("shape", "itemsize", "limit", "expected"),
  [
    ((), 4, 64, ()),
    ((5,), 4, 64, (5,)),
    ((100,), 4, 64, (16,)),
    ((3, 8, 4), 4, 64, (1, 4, 4)),
    ((3, 2, 2), 4, 32, (2, 2, 2)),
    ((3, 4, 100), 4, 64, (1, 1, 16)),
    ((0, 3), 4, 64, (1, 3)),
    ((40, 5120, 13824), 4, 64 << 20, (1, 1213, 13824)),
  ],
)
def test_chunks_are_no_larger_than_the_limit(shape, itemsize, limit, expected):
  assert stored_arrays.chunk_shape(shape, itemsize, limit) == expected


@pytest.mark.parametrize("limit", [4, 20, 48, 10**6])
def test_however_it_is_cut(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", limit)
  weights.save(tmp_path, "dit", CONFIG, PARAMS)
  assert len(chunks(tmp_path)) >= max(
    5, sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS)) // limit
  )
  assert_same(weights.load(tmp_path, "dit")[1])


def test_what_is_in_flight_stays_within_its_budget():
  """However many leaves are written at once; what is larger than all of it goes alone, and
  everyone's turn comes.
  """
  budget, held, peak, done = stored_arrays._Budget(100), 0, 0, []

  async def hold(size):
    nonlocal held, peak
    async with budget.take(size):
      held += min(size, 100)
      peak = max(peak, held)
      await asyncio.sleep(0)
      held -= min(size, 100)
    done.append(size)

  async def all_of(sizes):
    await asyncio.wait_for(asyncio.gather(*map(hold, sizes)), timeout=60)

  asyncio.run(all_of([60, 30, 50, 1000, 10, 10, 90]))
  assert peak == 100 and sorted(done) == [10, 10, 30, 50, 60, 90, 1000]


class Made:
  """A row that is made where it is asked for."""

  shape, dtype, size = (1, 1 << 18), np.dtype(np.float32), 1 << 18

  def __getitem__(self, row):
    return np.full(1 << 18, row, np.float32)


def test_few_chunks_are_in_memory_at_once(tmp_path, monkeypatch):
  """However many leaves there are, each as large as a chunk."""
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 1 << 20)
  tracemalloc.start()
  weights.save(tmp_path, "dit", CONFIG, {f"leaf {i}": Made() for i in range(40)})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 10 << 20


def test_stacks_are_read_one_row_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 8 * 4 * 4)
  rows = Rows(PARAMS["layers"]["kernel"])
  stack = Stack([*PARAMS["layers"]["bias"]])
  weights.save(
    tmp_path, "dit", CONFIG, {"kernel": stored_arrays.Cast(rows, jnp.bfloat16), "bias": stack}
  )
  assert rows.asked == [0, 1, 2]
  expected = {
    "kernel": PARAMS["layers"]["kernel"].astype(jnp.bfloat16),
    "bias": PARAMS["layers"]["bias"],
  }
  assert_same(weights.load(tmp_path, "dit")[1], expected)
