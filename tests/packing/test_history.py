"""The groups that a section's history becomes: which frames, where, and what a tail is."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import dit_packed
from hiar_jax.models.frames import Frames
from hiar_jax.packing import orders
from hiar_jax.packing.history import groups_of
from hiar_jax.packing.schedule import parse
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

ROWS, COLUMNS = 4, 6  # of patches
CONFIG = dataclasses.replace(tiny.CONFIG, packing=(1, 2, 4))


def video(frames: int) -> np.ndarray:
  return tiny.random(5, tiny.BATCH, frames, 2 * ROWS, 2 * COLUMNS, CONFIG.channels)


def described(groups) -> list[tuple[str, list[int]]]:
  return [(group.projection, np.asarray(group.positions).tolist()) for group in groups]


def tokens(groups) -> int:
  """By the network's own projections."""
  params = tiny.params(CONFIG)
  section = Frames(video(3), 0.5, np.arange(100, 103))
  texts = jnp.asarray(tiny.text())[None]
  run = quick_jit(lambda groups: [kv.k.shape[3] for kv in CONFIG.apply(params, groups, texts).kv])
  *found, own = np.asarray(run((*groups, section))).tolist()
  assert own == 3 * ROWS * COLUMNS
  return sum(found)


def test_groups_hold_the_frames_that_the_plan_names():
  schedule = parse("f1k1_x_td_f4k4f2k2f1k1_g3")
  step = orders.plan(schedule, orders.vanilla(4))[3]
  x = video(12)
  unread = np.where(np.isin(np.arange(12), [0, *range(2, 9)]), 0, np.nan).astype(np.float32)
  groups = groups_of(schedule, step, x + unread[None, :, None, None, None], 0.25, text=None)
  assert described(groups) == [
    ("packed_k1", [0]),
    ("packed_k4", [2, 3, 4, 5]),
    ("packed_k2", [6, 7]),
    ("packed_k1", [8]),
  ]
  for group in groups:
    np.testing.assert_array_equal(group.x, x[:, group.positions])
    assert group.sigma == 0.25 and group.text is None
  assert [read.group for read in groups[1].reads] == [0, 2, 3, 4]  # the section is the fifth
  expected = schedule.tokens(ROWS, COLUMNS) - 3 * ROWS * COLUMNS
  assert tokens(groups_of(schedule, step, x, 0.25)) == expected


def test_frames_that_do_not_exist_make_no_tokens():
  schedule = parse("td_f4k4f2k2f1k1_g3")
  made = orders.plan(schedule, orders.vanilla(3))
  x = np.full_like(video(9), np.nan)
  assert groups_of(schedule, made[0], x, 0.0) == ()
  x[:, :3] = 1
  second = groups_of(schedule, made[1], x, 0.0)
  assert described(second) == [("packed_k2", [0, 1]), ("packed_k1", [2])]
  x[:, 3:6] = 1
  third = groups_of(schedule, made[2], x, 0.0)
  assert described(third)[0] == ("packed_k4", [0, 1, 2])
  assert all(np.isfinite(group.x).all() for group in third)


def test_published_zeros():
  """Every group is whole from the start, with the published indices."""
  schedule = parse("f1k1_x_td_f4k4f2k2f1k1_g3")
  made = orders.plan(schedule, orders.vanilla(3), published=True)
  x = video(9)
  for at, step in enumerate(made):
    groups = groups_of(schedule, step, x, 0.0, published=True)
    assert described(groups) == [
      ("packed_k1", [0]),
      ("packed_k4", [1, 2, 3, 4]),
      ("packed_k2", [5, 6]),
      ("packed_k1", [7]),
    ]
    assert np.count_nonzero([group.x[0, :, 0, 0, 0].any() for group in groups]) == (0, 3, 4)[at]
  np.testing.assert_array_equal(groups[1].x[:, 1:], x[:, :3])
  assert not np.asarray(groups[1].x[:, :1]).any()
  with pytest.raises(UserError, match="zeros in their place need a plan with published = True"):
    groups_of(schedule, orders.plan(schedule, orders.vanilla(3))[0], x, 0.0, published=True)


@pytest.mark.parametrize("tail", ["tc", "ta"])
def test_tails(tail):
  """On both sides of a section, next to the furthest group there, under its kernel."""
  schedule = parse(f"{tail}_f4k4f1k1_g3_f1k1f2k2_{tail}")
  x = video(27)
  step = orders.plan(schedule, [(0, 1, 2, 3, 5, 6, 7, 8), (4,)])[1]
  assert step.generates.tolist() == [12, 13, 14]
  groups = groups_of(schedule, step, x, 0.0)
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


def test_an_appended_frame_is_embedded_as_its_mean():
  """With fresh projections, as the patch embedding of one averaged pixel."""
  schedule = parse("ta_f4k4_g3")
  x = video(12)
  step = orders.plan(schedule, orders.vanilla(4))[3]
  tail = groups_of(schedule, step, x, 0.0)[0]
  embedding = tiny.params(tiny.CONFIG)["patch_embedding"]
  fresh = dit_packed.initial_projection(embedding, 4, CONFIG.patch)
  found = dit_packed.cut_kernels(jnp.asarray(tail.x), (4, 8, 8)) @ fresh["kernel"]
  patch = np.tile(x[:, :5].mean((2, 3)), 4)  # 2 x 2 pixels of one frame
  np.testing.assert_allclose(found, patch @ embedding["kernel"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [10, 30, 60])
def test_a_compressed_history_is_as_long_whatever_it_holds(length):
  schedule = parse("tc_f4k4f2k2f1k1_g3")
  step = orders.plan(schedule, orders.vanilla(length // 3 + 1))[-1]
  groups = groups_of(schedule, step, video(length), 0.0)
  assert tokens(groups) == schedule.tokens(ROWS, COLUMNS) - 3 * ROWS * COLUMNS
