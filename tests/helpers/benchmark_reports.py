"""What a benchmark prints when it is run as a command, in a process of its own."""

import json
import subprocess
import sys
from typing import Any

from tests.helpers import tiny_run


def report_of(name: str, *options: str) -> dict[str, Any]:
  """The report of benchmarks.<name>. Fails where the command does, or where it is not finite."""
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", *options],
    cwd=tiny_run.ROOT,
    env=tiny_run.environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and "not finite" not in done.stderr, done.stderr
  return json.loads(done.stdout)
