"""`python -m hiar_jax.compare`, the former name of `python -m hiar_jax.evaluate`."""

import os
import subprocess
import sys

import pytest

from tests.helpers import tiny_run

NOTE = "note: hiar_jax.compare is now called hiar_jax.evaluate"


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess:
  # Without GLIBC_TUNABLES the tool starts its process again: the note must still come once.
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.run(
    command, cwd=tiny_run.ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


@pytest.mark.slow
def test_it_runs_evaluate_with_the_same_arguments_and_says_its_name(tmp_path):
  arguments = (f"--workdirs={tmp_path / 'missing'}", f"--out={tmp_path / 'out'}", "--videos=2")
  former, present = (_run(f"hiar_jax.{name}", *arguments) for name in ("compare", "evaluate"))
  assert present.returncode == 2 and str(tmp_path / "missing") in present.stderr
  assert former.stderr.splitlines() == [NOTE, *present.stderr.splitlines()]
  assert (former.returncode, former.stdout) == (present.returncode, present.stdout)
  assert not (tmp_path / "out").exists()
