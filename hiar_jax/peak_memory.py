"""How much memory a process took at its peak: the devices' own count where they keep one, else the
process's resident set.
"""

import dataclasses
import resource
import sys

import jax

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class Peak:
  """Bytes at the peak: of each local device by name, `devices` empty where none counts; and the
  process's resident set.
  """

  devices: dict[str, int]
  process: int

  def report(self) -> str:
    """One line that also says what was counted."""
    if not self.devices:
      kinds = ", ".join(sorted({device.platform for device in jax.local_devices()}))
      return (
        f"peak memory: {size(self.process)} resident in this process (the {kinds} devices "
        "keep no count of their own)"
      )
    each = ", ".join(f"{size(peak)} on {name}" for name, peak in self.devices.items())
    return f"peak memory: {each}; {size(self.process)} resident in this process"


def peak() -> Peak:
  """Since the process started."""
  return Peak(
    {
      str(device): count
      for device in jax.local_devices()
      if (count := _device_peak(device)) is not None
    },
    _resident(),
  )


def size(count: float) -> str:
  """Bytes for a reader: 1536 -> '1.5 KiB'."""
  step = 0
  while count >= 1024 and step < len(_UNITS) - 1:
    count, step = count / 1024, step + 1
  return (
    f"{count:.0f} {_UNITS[step]}" if count >= 100 or not step else f"{count:.3g} {_UNITS[step]}"
  )


def _device_peak(device: jax.Device) -> int | None:
  stats = device.memory_stats()  # None on CPUs
  return None if not stats else stats.get("peak_bytes_in_use")


def _resident() -> int:
  largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return largest if sys.platform == "darwin" else largest * 1024  # Linux counts in KiB
