"""Views: who sees whom, as runs, against masks written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.attention.views import View, dense_mask, simplified, view

bits = lambda row: np.asarray([c == "1" for c in row])


@pytest.mark.parametrize(
  ("sources", "keys"),
  [
    ([bits("111")], ((0, 3),)),
    ([bits("011"), bits("110")], ((1, 5),)),
    ([bits("101"), bits("01")], ((0, 1), (2, 3), (4, 5))),
  ],
)
def test_static_sources_are_runs(sources, keys):
  assert view((2, 4), sources) == View((2, 4), keys)


def test_a_traced_source_may_be_seen_whole_and_has_a_row():
  found = view((0, 1), [bits("010"), jnp.asarray(bits("01")), bits("00"), bits("11")])
  assert found.keys == ((1, 2), (3, 5), (7, 9)) and found.seen == 5
  np.testing.assert_array_equal(found.row, bits("10111"))
  mask = dense_mask((found,), 9)
  np.testing.assert_array_equal(mask, [bits("010010011")])


def test_where_nothing_is_there_all_is_seen():
  row = lambda there: view((0, 1), [bits("000"), there]).row
  np.testing.assert_array_equal(jax.jit(row)(jnp.zeros(2, bool)), bits("11"))
  np.testing.assert_array_equal(jax.jit(row)(jnp.asarray(bits("01"))), bits("01"))


def test_queries_without_keys_are_refused():
  with pytest.raises(ValueError, match=r"queries \(4, 6\) see no keys"):
    view((4, 6), [bits("000"), bits("0")])


def test_neighbours_that_see_the_same_are_one():
  a, b, c = View((0, 2), ((0, 3),)), View((2, 3), ((0, 3),)), View((3, 5), ((0, 5),))
  assert simplified((a, b, c), 5) == (View((0, 3), ((0, 3),)), c)
  assert simplified((a, b), 3) == ()
  row = View((0, 3), ((0, 3),), jnp.ones(3, bool))
  assert simplified((row,), 3) == (row,)


def test_cells_of_a_view():
  x = np.arange(12).reshape(1, 6, 2)
  np.testing.assert_array_equal(View((0, 1), ((1, 3), (5, 6))).of(x)[0, :, 0], [2, 4, 10])
  np.testing.assert_array_equal(View((0, 1), ((1, 3),)).of(x)[0, :, 0], [2, 4])


def test_a_static_mask_is_numpys():
  views = View((0, 2), ((0, 2),)), View((2, 3), ((1, 3),))
  mask = dense_mask(views, 3)
  assert isinstance(mask, np.ndarray)
  np.testing.assert_array_equal(mask, [bits("110"), bits("110"), bits("011")])
  assert dense_mask((), 3) is None
