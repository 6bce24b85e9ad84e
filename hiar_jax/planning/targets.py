"""The devices that a plan is for: those present, or some that only a compiler knows.

    here            the devices of this machine
    v5p:4x4x4       a slice of TPUs, by its topology; v5p:1x1x1 is one chip of the smallest
    h200:8x8        hosts x GPUs of each

XLA's compilers for TPUs and GPUs run on a CPU: neither chip nor driver is needed.
"""

import dataclasses
import importlib.metadata
import math
import os
import re

import jax
from jax.experimental import topologies

from hiar_jax.errors import UserError
from hiar_jax.planning import chips, device_memory
from hiar_jax.planning.chips import CHIPS, Chip

HERE = "here"
EXAMPLES = "v5p:4x4x4, v6e:16x16, v5e:4x4, tpu7x:4x4x4, h100:8x8, h200:1x8"
EXTRAS = {"tpu": "plan-tpu", "gpu": "plan-gpu"}  # of setup.py
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}
_SMALLEST = {3: "2x2x1", 2: "2x2"}  # slices, by their dimensions


@dataclasses.dataclass(frozen=True)
class Target:
  """name: as it was asked for. chip: None for devices of which nothing is stated, as a CPU.
  compiler: its name and version, on which memory and collectives depend. host: devices that share
  one host, as its fast links join them.
  """

  name: str
  chip: Chip | None
  devices: tuple[jax.Device, ...]
  compiler: str
  host: int

  @property
  def memory(self) -> int | None:
    """The bytes that a program may use on one device; None where nobody says."""
    if self.name == HERE and (counted := device_memory.counted(self.devices[0])):
      return counted
    return self.chip and self.chip.memory


def parse(name: str) -> Target:
  """Returns the devices of --on=NAME.

  Raises UserError for an unknown chip, sizes that are none, a slice that the compiler
  refuses, or a compiler that is not installed.
  """
  if name == HERE:
    devices = tuple(jax.devices())
    found = chips.of_kind(devices[0].device_kind)
    return Target(name, CHIPS.get(found), devices, _version(devices[0].platform), len(devices))
  chip, _, sizes = name.partition(":")
  if chip not in CHIPS:
    raise UserError(f"--on={name}: unknown chip {chip!r}; expected {HERE}, or one of {EXAMPLES}")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", sizes):
    raise UserError(f"--on={name}: expected sizes behind the chip, as in {EXAMPLES}")
  numbers = [int(size) for size in sizes.split("x")]
  platform = CHIPS[chip].platform
  if platform == "gpu" and len(numbers) != 2:
    raise UserError(f"--on={name}: expected hosts x GPUs of each, as in {chip}:8x8")
  try:
    devices = _gpus(chip, *numbers) if platform == "gpu" else _tpus(chip, sizes, numbers)
  except Exception as error:  # of many kinds, by version and platform
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if _version(platform):
      raise UserError(f"--on={name}: its compiler refuses such devices ({reason})") from error
    raise UserError(
      f"--on={name}: no compiler for {platform.upper()}s is installed ({reason}); pip install "
      f"'hiar_jax[{EXTRAS[platform]}]'"
    ) from error
  host = numbers[1] if platform == "gpu" else len(devices)
  return Target(name, CHIPS[chip], devices, _version(platform), host)


def _tpus(chip: str, sizes: str, numbers: list[int]) -> tuple[jax.Device, ...]:
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else it waits for a cloud's metadata
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is opened: several may plan at once
  one = math.prod(numbers) == 1
  if one:  # a slice is whole hosts
    sizes = _SMALLEST.get(len(numbers), sizes)
  found = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{sizes}")
  return tuple(found.devices[:1] if one else found.devices)


def _gpus(chip: str, hosts: int, each: int) -> tuple[jax.Device, ...]:
  found = topologies.get_topology_desc(
    platform="cuda",
    topology_name="any",
    target_config=chips.description(chip),
    topology=f"{hosts}x1x{each}",  # slices (joined by NVLink) x hosts x GPUs
  )
  return tuple(found.devices)


def _version(platform: str) -> str:
  """Returns the compiler's name and version, '' where there is none."""
  for name in _COMPILERS.get("gpu" if platform in ("cuda", "rocm") else platform, ("jaxlib",)):
    try:
      return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
      continue
  return ""
