"""A section and its packed context as groups: what is there, what is not, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, frames_at, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from tests.helpers import tiny

FILLING = parse("td_f2k2f1k1_g2_x_f1k1")


def test_frames_that_are_not_there_are_zeros():
  """Whatever their place holds."""
  video = tiny.video(0, 4)
  video[:, 0] = video[:, 3] = np.nan
  frames = frames_at(video, np.asarray([1, -1, 2]))
  np.testing.assert_array_equal(frames, np.stack([video[:, 1], 0 * video[:, 1], video[:, 2]], 1))
  each = frames_at(video, np.asarray([[2, 1], [1, -1]]))
  np.testing.assert_array_equal(each[0], video[0, [2, 1]])
  np.testing.assert_array_equal(each[1], [video[1, 1], 0 * video[1, 1]])


def test_tables_keep_the_order_of_steps():
  steps = orders.plan(FILLING, orders.endpoints(5, (0, 2, 4)))
  ends, rest = tables(steps)
  assert ends.sections.tolist() == [[0, 2, 4]] and rest.sections.tolist() == [[1], [3]]
  assert ends.generates.tolist() == [[0, 1, 4, 5, 8, 9]]
  for table, chosen in ((ends, steps[:1]), (rest, steps[1:])):
    for i, step in enumerate(chosen):
      for got, want in zip(table.context, step.context, strict=True):
        assert got[i].tolist() == want.tolist()
      assert table.indices[i].tolist() == step.indices.tolist()
  assert all((indices >= 0).all() for table in (ends, rest) for indices in table.context_indices)


def test_groups_hold_what_the_row_says():
  video, x = tiny.video(1, 8), tiny.video(2, 2)
  _, gap = tables(orders.plan(FILLING, orders.both_ends(4)))
  one = jax.tree.map(lambda part: part[0], gap)
  *packed, noisy = groups_of_row(FILLING, History(), video, one, x, 0.7)
  assert [group.projection for group in packed] == ["packed_k2", "packed_k1", "packed_k1"]
  for group, frames in zip(packed, ([-1, 0], [1], [6]), strict=True):
    want = np.stack([video[:, i] if i >= 0 else 0 * video[:, 0] for i in frames], axis=1)
    np.testing.assert_array_equal(group.x, want)
    assert group.positions.tolist() == [max(i, 0) for i in frames]
    assert group.sigma == 0.7 and group.text == 0
  assert noisy.x is x and noisy.positions.tolist() == [2, 3] and noisy.sigma == 0.7


def test_published_zeros():
  """Every group is whole from the start, with the published indices."""
  schedule = parse("f1k1_x_td_f4k4f2k2f1k1_g3")
  (table,) = tables(orders.plan(schedule, orders.vanilla(3), published=True))
  video, x = tiny.video(1, 9), tiny.video(2, 3)
  for at in range(3):
    row = jax.tree.map(lambda part: part[at], table)  # noqa: B023
    *packed, noisy = groups_of_row(schedule, History(), video, row, x, 0.0)
    assert [(g.projection, g.positions.tolist()) for g in packed] == [
      ("packed_k1", [0]),
      ("packed_k4", [1, 2, 3, 4]),
      ("packed_k2", [5, 6]),
      ("packed_k1", [7]),
    ]
    assert noisy.positions.tolist() == [8, 9, 10]
    assert np.count_nonzero([group.x[0, :, 0, 0, 0].any() for group in packed]) == (0, 3, 4)[at]
  np.testing.assert_array_equal(packed[1].x[:, 1:], video[:, :3])
  assert not np.asarray(packed[1].x[:, :1]).any()


def test_history_that_is_clean_and_hears_nothing():
  video, x = tiny.video(1, 4), tiny.video(2, 2)
  (table,) = tables(orders.plan(FILLING, [(1,)]))
  row = jax.tree.map(lambda part: part[0], table)
  sigma = jnp.asarray([0.7, 0.2])
  *packed, noisy = groups_of_row(FILLING, History("clean", hears=False), video, row, x, sigma)
  assert all(group.text is None and group.sigma.tolist() == [0, 0] for group in packed)
  assert noisy.text == 0 and noisy.sigma is sigma
  with pytest.raises(UserError, match="level = 'noisy': expected one of section, clean"):
    History("noisy")
