"""The peak memory of a process: its resident set, and the count of each device that keeps one."""

import pathlib
import resource
import sys

import jax

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def report(devices: dict[str, int], process: int) -> str:
  """Returns a line with the bytes of `peak` and with what was counted."""
  if not devices:
    kinds = ", ".join(sorted({device.platform for device in jax.local_devices()}))
    return (
      f"peak memory: {size(process)} resident in this process (the {kinds} devices keep no count "
      "of their own)"
    )
  each = ", ".join(f"{size(count)} on {name}" for name, count in devices.items())
  return f"peak memory: {each}; {size(process)} resident in this process"


def peak() -> tuple[dict[str, int], int]:
  """Returns the bytes at the peak since the process started: of each local device that counts them,
  by name, and of the process.
  """
  # memory_stats is None on CPUs
  stats = {str(device): device.memory_stats() or {} for device in jax.local_devices()}
  devices = {
    name: counts["peak_bytes_in_use"]
    for name, counts in stats.items()
    if counts.get("peak_bytes_in_use") is not None
  }
  return devices, _resident()


def _resident() -> int:
  """Returns the bytes of the process's largest resident set."""
  status = pathlib.Path("/proc/self/status")
  for line in status.read_text().splitlines() if status.exists() else ():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) * 1024
  # on Linux this would be at least that of the process that started this one
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return resident if sys.platform == "darwin" else resident * 1024  # bytes on macOS, else KiB


def size(count: float) -> str:
  """Formats bytes to 3 digits with a unit: 1536 -> '1.5 KiB'."""
  unit = 0
  while count >= 1024 and unit < len(_UNITS) - 1:
    count /= 1024
    unit += 1
  # .3g would write 1023 as 1.02e+03
  number = f"{count:.0f}" if count >= 100 or not unit else f"{count:.3g}"
  return f"{number} {_UNITS[unit]}"
