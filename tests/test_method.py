"""Rows of the table of methods: their context levels, and rows that contradict themselves."""

import dataclasses

import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import Method


def test_context_levels():
  for level, expected in (("output", 0.6), ("clean", 0.0), ("input", 0.9)):
    assert Method(level=level).context_sigma(0.9, 0.6) == expected


def test_a_clean_sink_is_one_that_is_generated_first():
  row = Method(block=3, window=12, sink=3, sink_level="clean")
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
  )
  assert dataclasses.asdict(Method()) == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"order": "sideways"}, "history.order = 'sideways': expected one of step_first, block_first"),
    ({"level": "noisy"}, "history.level = 'noisy'"),
    ({"gradient": "none"}, "history.gradient = 'none'"),
    ({"renoise": "ode"}, "history.renoise = 'ode'"),
    ({"sink_level": "output"}, "history.sink_level = 'output'"),
    ({"block": 0}, "block >= 1"),
    ({"sink": -1}, "sink >= 0"),
    ({"window": -3}, "window >= 0"),
    ({"window": 2}, r"history.window = 2 cannot hold a block \(3\)"),
    ({"window": 5, "sink": 3}, r"cannot hold a block \(3\) and the sink \(3\)"),
    ({"order": "block_first"}, "history.level = 'output': block_first"),
    ({"sink": 2, "sink_level": "clean"}, "history.sink = 2 is not a multiple of block = 3"),
  ],
  ids=str,
)
def test_contradictions_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    Method(**change)
