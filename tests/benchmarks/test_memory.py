"""Planned against measured memory, of programs of some hundreds of MiB."""

import pytest

from tests.helpers.benchmark_reports import report_of


@pytest.mark.slow
def test_a_program_takes_what_was_planned():
  found = report_of(
    "memory",
    "--config=experiments/shapes.py",
    "--program=teacher,causal_init",
    "--config.teacher.batch=256",
    "--config.causal_init.batch=256",
  )
  assert list(found["programs"]) == ["teacher", "causal_init"]
  for program in found["programs"].values():
    assert program["planned"] > 2**28 and program["ratio"] == pytest.approx(1, abs=0.1)
