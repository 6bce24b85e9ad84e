"""The benchmark of training updates, at a size of which the numbers say nothing."""

import pytest

from tests.helpers.benchmark_reports import report_of


@pytest.mark.slow
def test_every_stage_is_timed():
  found = report_of("train", "--config=experiments/shapes.py:smoke", "--updates=3")
  assert list(found["stages"]) == ["teacher", "causal_init", "critic", "generator"]
  for stage in found["stages"].values():
    assert (
      0
      < stage["update_s"]["p5"]
      <= stage["update_s"]["median"]
      <= stage["update_s"]["p95"]
      < stage["compile_s"]
    )
    assert (
      stage["clips_per_s"] == pytest.approx(stage["batch"] / stage["update_s"]["median"], rel=0.05)
      and stage["peak_bytes"] > 2**20
    )
  assert found["hardware"]["devices"] == 1 and found["versions"]["jax"]
