"""The memory of a device: as it says itself, as its maker states, or its share of the host's."""

from collections.abc import Sequence
import os

import jax

from hiar_jax.planning import chips


def counted(device: jax.Device) -> int | None:
  """Returns the bytes that a program may use on a device that is there; None where nobody says."""
  stated = device.memory_stats() or {}
  if "bytes_limit" in stated:
    return stated["bytes_limit"]
  chip = chips.CHIPS.get(chips.of_kind(device.device_kind))
  return chip and chip.memory


def of_host(devices: Sequence[jax.Device]) -> int:
  """Returns a device's part of this machine's memory, where its devices share it as CPUs do."""
  mine = [device for device in devices if device.process_index == jax.process_index()]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, len(mine))
