"""The benchmark of excess precision, at a size of which the numbers say nothing."""

import json
import subprocess
import sys

import pytest

from tests.helpers import tiny_run


@pytest.mark.slow
def test_both_settings_are_compared():
  command = [
    *(sys.executable, "-m", "benchmarks.precision", "--config=experiments/shapes.py:smoke"),
    *("--config.model.dtype=bfloat16", "--devices=2", "--updates=2"),
  ]
  environment = tiny_run.environment()
  done = subprocess.run(command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)["excess_precision"]
  assert list(found) == ["true", "false"]
  for setting in found.values():
    assert setting["update_s"] > 0
    for name in ("forward", "update"):
      assert 0 <= setting[name]["bit_equal"] <= 1 and 0 <= setting[name]["apart"] < 1
