"""Hardware and versions that a benchmark ran on, for its report."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform

import jax

import hiar_jax
from hiar_jax import peak_memory


def hardware() -> dict:
  """Returns the processor, memory and devices of this machine (Linux)."""
  model = [
    line.split(":")[1].strip()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    if "model name" in line  # not on ARM
  ]
  # The first line is "MemTotal: <n> kB".
  memory = pathlib.Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
  return {
    "cpu": model[0] if model else platform.machine(),
    "cores": len(os.sched_getaffinity(0)),  # those that this process may use
    "memory_bytes": int(memory) * 1024,
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "platform": jax.devices()[0].platform,
    "load": os.getloadavg()[0],  # over the last minute, other work included
  }


def peak_bytes() -> int:
  """Returns the peak memory of the first accelerator so far, or of this process where none is."""
  devices, process = peak_memory.peak()
  return next(iter(devices.values()), process)


def versions() -> dict:
  """Returns the versions of Python and of the packages that decide speed and memory, of those that
  are installed: benchmarks.card needs few of them.
  """
  packages = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "safetensors",
  )
  found = {"python": platform.python_version(), "hiar_jax": hiar_jax.__version__}
  for name in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def report(found: dict) -> str:
  """Returns what a benchmark found, and where, as the JSON that it prints."""
  return json.dumps({**found, "hardware": hardware(), "versions": versions()}, indent=2)
