"""Cases of a test that only `-m slow` runs: those that compile for long and differ little."""

import pytest


def slow(*cases):
  """Returns the cases, each one value or a tuple of values, marked slow."""
  values = (case if isinstance(case, tuple) else (case,) for case in cases)
  return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


def few(cases, *quick):
  """Returns all cases in their order; those that are not `quick` are marked slow."""
  cases = list(cases)
  assert all(case in cases for case in quick), quick
  return [part for case in cases for part in ([case] if case in quick else slow(case))]
