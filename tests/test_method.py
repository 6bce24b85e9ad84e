"""Rows of the table of methods, rows that contradict themselves, and rows bound to noise levels."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import Method, MethodConfig


def test_context_levels():
  for level, expected in (("output", 0.6), ("clean", 0.0), ("input", 0.9), ("fixed:0.3", 0.3)):
    assert MethodConfig(level=level).context.sigma(0.9, 0.6) == expected


def test_a_clean_sink_is_one_that_is_generated_first():
  row = MethodConfig(block=3, window=12, sink=3, sink_level="clean")
  assert row.clean_sink == 3
  assert dataclasses.replace(row, sink_level="history").clean_sink == 0
  # clean as all history there
  assert dataclasses.replace(row, order="block_first", level="clean").clean_sink == 0


def test_the_default_is_hiar():
  expected = dict(
    block=3,
    order="step_first",
    level="output",
    gradient="detached",
    window=21,
    sink=0,
    sink_level="history",
    renoise="fresh",
    past="ring",
    packing="",
  )
  assert dataclasses.asdict(MethodConfig()) == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"order": "sideways"}, "history.order = 'sideways': expected one of step_first, block_first"),
    ({"level": "noisy"}, "history.level = 'noisy': expected one of clean, fixed, input, output"),
    ({"level": "fixed:1"}, "a fixed context level lies between 0 and 1, got 1.0"),
    ({"gradient": "none"}, "history.gradient = 'none'"),
    ({"renoise": "ode"}, "history.renoise = 'ode'"),
    ({"sink_level": "output"}, "history.sink_level = 'output'"),
    ({"block": 0}, "block >= 1"),
    ({"sink": -1}, "sink >= 0"),
    ({"window": -3}, "window >= 0"),
    ({"window": 2}, r"history.window = 2 cannot hold a block \(3\)"),
    ({"window": 5, "sink": 3}, r"cannot hold a block \(3\) and the sink \(3\)"),
    ({"order": "block_first"}, "history.level = 'output': block_first"),
    ({"order": "block_first", "level": "input"}, "history.level = 'input': block_first"),
    ({"sink": 2, "sink_level": "clean"}, "history.sink = 2 is not a multiple of block = 3"),
  ],
  ids=str,
)
def test_contradictions_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    MethodConfig(**change)


# -- at noise levels

SIGMAS = np.asarray([1.0, 0.9, 0.6, 0.0], np.float32)


def test_a_row_at_its_levels():
  row = MethodConfig(block=2, window=7, sink=1, level="input", renoise="euler")
  method = row.at(SIGMAS, "relative")
  assert isinstance(method, Method) and method.levels == 3 and method.moves_sink
  assert {name: getattr(method, name) for name in dataclasses.asdict(row)} == dataclasses.asdict(
    row
  )
  assert method.sigma_table.dtype == np.float32
  np.testing.assert_array_equal(method.sigma_table, SIGMAS)
  assert method == row.at(method.sigmas, "relative") and hash(method) == hash(
    row.at(SIGMAS, "relative")
  )
  assert method != row.at(SIGMAS) and row.at(SIGMAS).sink_positions == "absolute"
  # bound again, it is the row at the new levels
  assert method.at((1.0, 0.0)) == row.at((1.0, 0.0))


@pytest.mark.parametrize(
  ("row", "place", "moves"),
  [
    (MethodConfig(block=2, window=7, sink=1), "relative", True),
    (MethodConfig(block=2, window=7, sink=1), "absolute", False),
    (MethodConfig(block=2, window=7), "relative", False),
    (MethodConfig(block=2, window=0, sink=1), "relative", False),
  ],
)
def test_a_sink_moves_with_a_window_at_relative_positions(row, place, moves):
  assert row.at(SIGMAS, place).moves_sink is moves
