"""Tails that are kept: which frames are in them, as what they are shown, and how many tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import dit_packed
from hiar_jax.models.frames import Frames
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, Row, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

ROWS, COLUMNS = 4, 6  # of patches
CONFIG = dataclasses.replace(tiny.CONFIG, packing=(1, 2, 4))
SIGMA = np.float32(0.5)
BOTH = "{0}_f4k4f1k1_g3_f1k1f2k2_{0}"
GAP = [(0, 1, 2, 3, 5, 6, 7, 8), (4,)]  # 12 frames before section 4, and 12 behind it


def video(frames: int) -> np.ndarray:
  return tiny.random(5, tiny.BATCH, frames, 2 * ROWS, 2 * COLUMNS, CONFIG.channels)


def packed(notation: str, steps, x, at: int = -1, **changes) -> tuple[Frames, ...]:
  """The packed groups of a step of an order."""
  schedule = parse(notation)
  step = orders.plan(schedule, steps)[at]
  row = jax.tree.map(lambda part: part[0], tables([step])[0])
  noisy = video(schedule.generate)
  given = {"patch": CONFIG.patch} | changes
  make = lambda *arrays: groups_of_row(schedule, History(), *arrays, SIGMA, **given)[:-1]
  return quick_jit(make)(x, row, noisy)  # op by op it would take longer


def tokens(groups) -> int:
  """By the network's own projections."""
  params = tiny.params(CONFIG)
  section = Frames(video(3), SIGMA, np.arange(100, 103, dtype=np.int32))
  texts = jnp.asarray(tiny.text())[None]
  run = quick_jit(
    lambda groups: [kv.k.shape[2] * kv.k.shape[3] for kv in CONFIG.apply(params, groups, texts).kv]
  )
  *found, own = np.asarray(run((*groups, section))).tolist()
  assert own == 3 * ROWS * COLUMNS
  return sum(found)


@pytest.mark.parametrize("tail", ["tc", "ta"])
def test_tails(tail):
  """On both sides of a section, next to the furthest group there, under its kernel."""
  x = video(27)
  groups = packed(BOTH.format(tail), GAP, x)
  assert [g.projection for g in groups] == [f"packed_k{pool}" for pool in (4, 4, 1, 1, 2, 2)]
  first, last = groups[0], groups[-1]
  if tail == "tc":
    np.testing.assert_allclose(first.x, x[:, :7].mean(1, keepdims=True), rtol=0, atol=1e-6)
    np.testing.assert_allclose(last.x, x[:, 18:].mean(1, keepdims=True), rtol=0, atol=1e-6)
    assert first.positions.tolist() == [3] and last.positions.tolist() == [22]
    assert tokens(groups[:1]) == 2 and tokens(groups[-1:]) == 6
    return
  assert tokens(groups[:1]) == 7 and tokens(groups[-1:]) == 9
  assert first.positions.tolist() == np.repeat(np.arange(7), 4).tolist()
  pixels = x.mean((2, 3))
  for group, pool, frames in ((first, 4, slice(7)), (last, 2, slice(18, 27))):
    shape = (tiny.BATCH, pixels[:, frames].shape[1], pool, 2 * pool, 2 * pool, CONFIG.channels)
    expected = np.broadcast_to(pixels[:, frames][:, :, None, None, None], shape)
    np.testing.assert_allclose(group.x.reshape(shape), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tail", ["tc", "ta"])
def test_only_frames_that_are_there_are_in_a_tail(tail):
  """The others hold NaN, which a product with 0 would let through."""
  x = video(27)
  x[:, 12:15] = x[:, 18:21] = np.nan  # section 4, which is made, and section 6, which is not yet
  groups = packed(BOTH.format(tail), [(0, 1, 2, 3, 5, 7, 8), (4,)], x)
  assert all(np.isfinite(group.x).all() for group in groups)
  shown, want = groups[-1].x.mean(1), x[:, 21:].mean(1)
  if tail == "ta":
    shown, want = shown.mean((1, 2)), want.mean((1, 2))
  np.testing.assert_allclose(shown, want, rtol=0, atol=1e-6)


def test_an_appended_frame_is_embedded_as_its_mean():
  """With fresh projections, as the patch embedding of one averaged pixel."""
  x = video(12)
  tail = packed("ta_f4k4_g3", orders.vanilla(4), x)[0]
  embedding = tiny.params(tiny.CONFIG)["patch_embedding"]
  fresh = dit_packed.initial_projection(embedding, 4, CONFIG.patch)
  found = dit_packed.cut_kernels(jnp.asarray(tail.x), (4, 8, 8)) @ fresh["kernel"]
  patch = np.tile(x[:, :5].mean((2, 3)), 4)  # 2 x 2 pixels of one frame
  np.testing.assert_allclose(found, patch @ embedding["kernel"], rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match="give `patch`"):
    packed("ta_f4k4_g3", orders.vanilla(4), x, patch=None)


@pytest.mark.parametrize("length", [12, 30, 60])
def test_a_compressed_history_is_as_long_whatever_it_holds(length):
  notation = "tc_f4k4f2k2f1k1_g3"
  groups = packed(notation, orders.vanilla(length // 3 + 1), video(length))
  assert tokens(groups) == parse(notation).tokens(ROWS, COLUMNS) - 3 * ROWS * COLUMNS


def shapes(table: Row) -> list[int]:
  """Sections, and lengths of the two tails."""
  sides = [0 if tail is None else tail.indices.shape[-1] for tail in table.tails]
  return [len(table.sections), *sides]


def test_steps_of_one_shape_are_one_table():
  """One with a compressed tail and one without; of an appended tail one for each length."""
  planned = lambda notation: orders.plan(parse(notation), orders.vanilla(6))
  assert [shapes(table) for table in tables(planned("td_f2k2f1k1_g2"))] == [[6, 0, 0]]
  without, compressed = tables(planned("tc_f2k2f1k1_g2"))
  assert shapes(without) == [2, 0, 0] and shapes(compressed) == [4, 1, 0]
  assert compressed.tails[0].frames.sum(1).tolist() == [1, 3, 5, 7]
  assert compressed.tails[0].indices[:, 0].tolist() == [0, 1, 2, 3]
  appended = tables(planned("ta_f2k2f1k1_g2"))
  assert [shapes(table) for table in appended] == [[2, 0, 0]] + [[1, n, 0] for n in (1, 3, 5, 7)]


def test_steps_of_a_shape_come_together_where_their_order_says_nothing():
  schedule = parse("ta_f2k2f1k1_g2")
  steps = [s for _ in range(2) for s in orders.plan(schedule, orders.vanilla(3))]
  assert [shapes(table) for table in tables(steps)] == [[2, 0, 0], [1, 1, 0]] * 2
  assert [shapes(t) for t in tables(steps, ordered=False)] == [[4, 0, 0], [2, 1, 0]]


def test_equally_long_tails_on_other_sides_are_other_shapes():
  schedule = parse("ta_f1k1_g1_f1k1_ta")
  before = orders.plan(schedule, [(0, 1), (2,)])[1]
  behind = orders.plan(schedule, [(1, 2), (0,)])[1]
  assert [shapes(t) for t in tables([before, behind])] == [[1, 1, 0], [1, 0, 1]]


def test_later_moves_every_index():
  row = jax.tree.map(
    lambda part: part[0], tables(orders.plan(parse("tc_f1k1_g1_f1k1_ta"), [(0, 1, 3, 4), (2,)]))[1]
  )
  row = jax.tree.map(lambda part: part[None], row)
  moved = row.later(np.asarray([7, 9], np.int32))
  assert moved.indices.tolist() == [[9], [11]] and moved.generates.tolist() == [[2]]
  assert [x.tolist() for x in moved.context_indices] == [[[8], [10]], [[10], [12]]]
  assert [tail.indices.tolist() for tail in moved.tails] == [[[7], [9]], [[11], [13]]]
  assert [tail.frames.tolist() for tail in moved.tails] == [[[1, 0, 0, 0, 0]], [[4]]]
