"""The peak memory of a process, and bytes as text."""

import subprocess
import sys

import pytest

from hiar_jax import peak_memory


def test_memory_of_this_process():
  """In a fresh one, whose peak nothing before it has raised."""
  code = (
    "import numpy as np; from hiar_jax import peak_memory\n"
    "before = peak_memory.peak()[1]; held = np.ones(2**25)\n"
    "print(peak_memory.peak()[1] - before)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert float(done.stdout) == pytest.approx(2**28, rel=0.1)
  devices, after = peak_memory.peak()
  assert devices == {}
  said = peak_memory.report(devices, after)
  assert "resident in this process (the cpu devices keep no count of their own)" in said
  assert (
    peak_memory.report({"gpu:0": 3 * 2**30}, 2**20)
    == "peak memory: 3 GiB on gpu:0; 1 MiB resident in this process"
  )
  assert [peak_memory.size(n) for n in (0, 1023, 1536, 200 * 2**20, 2**50)] == [
    "0 B",
    "1023 B",
    "1.5 KiB",
    "200 MiB",
    "1024 TiB",
  ]
