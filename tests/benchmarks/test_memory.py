"""Planned against measured memory, of programs of some hundreds of MiB."""

import json
import subprocess
import sys

import pytest

from tests.helpers import tiny_run


@pytest.mark.slow
def test_a_program_takes_what_was_planned():
  command = [
    *(sys.executable, "-m", "benchmarks.memory", "--config=experiments/shapes.py"),
    *("--program=teacher,causal_init", "--config.teacher.batch=256"),
    *("--config.causal_init.batch=256",),
  ]
  environment = tiny_run.environment()
  done = subprocess.run(command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert list(found["programs"]) == ["teacher", "causal_init"]
  for program in found["programs"].values():
    assert program["planned"] > 2**28 and program["ratio"] == pytest.approx(1, abs=0.1)
