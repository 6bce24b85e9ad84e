"""History chosen by similarity: against a plain sort, and against the schedule by time."""

import jax
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from hiar_jax.packing.similarity import choose
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import slow

SIMILAR = History(sort="similarity", time_weight=0.3, frame_seconds=0.5)


def row_of(notation: str, steps, at: int, given: int = 0):
  step = orders.plan(parse(notation), steps, given=given, similar=True)[at]
  return jax.tree.map(lambda part: part[0], tables([step])[0])


def chosen_row(schedule, history, x, row):
  """Compiled: op by op it would take longer."""
  return quick_jit(lambda x, row: choose(schedule, history, x, row))(x, row)


def likeness(x: np.ndarray, frame: int, near: int) -> float:
  """Eq. 3 to 5 of one clip [f h w c], pixel by pixel, the sum over pixels as a mean."""
  pixels = zip(x[frame].reshape(-1, x.shape[-1]), x[near].reshape(-1, x.shape[-1]), strict=True)
  cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pixels]
  seconds = (frame - near) * SIMILAR.frame_seconds
  return np.mean(cosine) + SIMILAR.time_weight * np.exp(-(seconds**2))


def test_the_most_similar_frames_are_nearest_to_the_section():
  """On both sides, each example by itself; what is not made holds NaN."""
  notation, x = "td_f4k2f2k1_g2_f1k1f2k2_td", tiny.video(3, 26)
  x[:, 16:18] = x[:, 20:22] = np.nan
  steps = [(*range(8), 9, 11, 12), (8,)]
  row = chosen_row(parse(notation), SIMILAR, x, row_of(notation, steps, 1))
  others = []
  for i in range(tiny.BATCH):
    for near, free, places in (
      (15, range(16), [(1, 2), (0, 4)]),
      (18, (18, 19, 22, 23, 24, 25), [(2, 1), (3, 2)]),
    ):
      ranked = sorted(free, key=lambda frame: -likeness(x[i], frame, near))  # noqa: B023
      assert ranked[0] == near
      for group, count in places:
        want, ranked = ranked[:count], ranked[count:]
        assert row.context[group][i].tolist() == sorted(want)
        assert row.context_indices[group][i].tolist() == sorted(want)
      others.append(ranked)
  assert any(frame > 8 for frame in others[0])  # time alone would have dropped the oldest


@pytest.mark.parametrize(
  ("notation", "steps", "given"),
  [
    ("td_f2k2f1k1_g2_x_f1k1", orders.both_ends(5), 0),
    ("f1k1_x_g2_f1k1f2k2_td", orders.inverted(5), 1),
    ("g2_f1k1f2k2_tc", orders.inverted(5), 0),
    *slow(
      ("f1k1_x_td_f4k4f2k2f1k1_g2", orders.vanilla(6), 1),
      ("ta_f2k2f1k1_g2", orders.vanilla(6), 0),
      ("tc_f2k2f1k1_g2", orders.vanilla(6), 0),
      ("g2_f1k1f2k2_ta", orders.inverted(5), 0),
    ),
  ],
)
def test_where_time_decides_nothing_is_sorted(notation, steps, given):
  """With a weight that drowns the cosines the groups are those of the schedule by time."""
  schedule, by_time = parse(notation), History(sort="similarity", time_weight=1e6)
  frames = given + schedule.generate * (1 + max(map(max, steps)))
  x, noisy = tiny.video(3, frames), tiny.video(4, schedule.generate)
  # a frame that is kept in any case is not chosen again, so it may leave a place of its own empty
  kept = 1 if schedule.start and schedule.before else 0
  for at in range(kept * 4, len(steps)):
    step = orders.plan(schedule, steps, given=given)[at]
    plain = jax.tree.map(lambda part: part[0], tables([step])[0])
    chosen = chosen_row(schedule, by_time, x, row_of(notation, steps, at, given))
    assert (plain.tails[0] is None) == (chosen.tails[0] is None)
    groups = quick_jit(
      lambda row: groups_of_row(
        schedule, by_time, x, row, noisy, np.float32(0.5), patch=tiny.CONFIG.patch
      )
    )
    for got, want in zip(groups(chosen), groups(plain), strict=True):
      np.testing.assert_array_equal(got.x, want.x)
      np.testing.assert_array_equal(
        np.broadcast_to(got.positions, (tiny.BATCH, got.positions.shape[-1])),
        np.broadcast_to(want.positions, (tiny.BATCH, want.positions.shape[-1])),
      )


@pytest.mark.parametrize("kind", ["tc", "ta"])
def test_a_tail_is_what_no_group_holds(kind):
  notation, x = f"{kind}_f2k1f1k1_g2", tiny.video(3, 12)
  row = chosen_row(parse(notation), SIMILAR, x, row_of(notation, orders.vanilla(6), 5))
  for i in range(tiny.BATCH):
    held = {frame for group in row.context for frame in group[i].tolist()}
    rest = sorted(set(range(10)) - held)
    assert len(held) == 3
    if kind == "ta":
      assert row.tails[0].frames[i].tolist() == row.tails[0].indices[i].tolist() == rest
    else:
      assert np.flatnonzero(row.tails[0].frames[i]).tolist() == rest
      assert row.tails[0].indices[i].tolist() == [rest[len(rest) // 2]]


def test_kept_frames_are_not_chosen_again():
  notation, x = "f1k1_x_td_f3k1_g2", tiny.video(3, 12)
  x[:, 5] = x[:, 0]  # the frame before section 3 is the first one again
  row = chosen_row(parse(notation), SIMILAR, x, row_of(notation, orders.vanilla(6), 3))
  assert 5 in row.context[1][0].tolist() and 0 not in row.context[1][0].tolist()
  assert row.context[0].tolist() == [0]


def test_frames_that_are_not_there_are_left_out():
  notation, x = "td_f2k2f2k1_g2", tiny.video(3, 4)
  row = chosen_row(parse(notation), SIMILAR, x, row_of(notation, orders.vanilla(2), 1))
  assert [group[0].tolist() for group in row.context] == [[-1, -1], [0, 1]]
  row = chosen_row(parse(notation), SIMILAR, 0 * x + np.nan, row_of(notation, orders.vanilla(2), 0))
  assert [group[0].tolist() for group in row.context] == [[-1, -1], [-1, -1]]
  assert [at[0].tolist() for at in row.context_indices] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
  ("notation", "steps", "at", "chosen"),
  [
    ("td_f2k2f1k1_g2", orders.vanilla(4), 3, [[3, 4], [5]]),
    ("g2_f1k1f2k2_td", orders.inverted(4), 3, [[2], [3, 4]]),
  ],
)
def test_of_equals_the_nearest_are_chosen(notation, steps, at, chosen):
  still = np.ones_like(tiny.video(3, 8))
  history = History(sort="similarity", time_weight=0.0)
  row = chosen_row(parse(notation), history, still, row_of(notation, steps, at))
  assert [group[0].tolist() for group in row.context] == chosen


def test_by_time_a_row_stays_as_it_is():
  schedule = parse("td_f2k2f1k1_g2")
  (table,) = tables(orders.plan(schedule, orders.vanilla(3)))
  row = jax.tree.map(lambda part: part[2], table)
  assert choose(schedule, History(), tiny.video(3, 6), row) is row


def test_what_cannot_be_sorted():
  with pytest.raises(UserError, match="sort = 'colour': expected one of time, similarity"):
    History(sort="colour")
  with pytest.raises(UserError, match="time_weight = -1: expected at least 0"):
    History(time_weight=-1)
  with pytest.raises(UserError, match="'td_f2k2f1k1_g2': the published frame indices"):
    orders.plan(parse("td_f2k2f1k1_g2"), orders.vanilla(3), published=True, similar=True)
