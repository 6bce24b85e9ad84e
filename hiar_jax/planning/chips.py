"""Chips that programs are planned for, with what their makers state.

A device is what JAX calls one: a GPU, a TPU chip, or one of the two halves of a tpu7x chip. Peaks
are those of dense bfloat16 products. Links carry as much out as in at the same time; the bytes here
are those of one direction.
"""

import dataclasses

GIB = 2**30
CLOUD = "cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  memory: bytes that a program may use. flops: a second, bfloat16. link: bytes a second that a
  device receives from others of its slice or host, over all of its links. network: the same, from
  other hosts, by a network card for each device; 0: hosts are linked as devices are.
  kinds: parts of the names that JAX gives these devices.
  """

  platform: str
  memory: int
  flops: float
  link: float
  network: float
  source: str
  kinds: tuple[str, ...] = ()


# TPUs: the memory is what the compiler grants (v5p: in its own words, 95.74G); the links are half
# of the "bidirectional inter-chip interconnect bandwidth per chip". tpu7x: half of a chip.
# GPUs: half of NVLink's total; a network card of 400 Gb/s for each GPU, as in a DGX.
CHIPS: dict[str, Chip] = {
  "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 200e9, 0, f"{CLOUD}/v5e", ("v5 lite", "v5e")),
  "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 600e9, 0, f"{CLOUD}/v5p", ("v5p", "TPU v5")),
  "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 400e9, 0, f"{CLOUD}/v6e", ("v6 lite", "v6e")),
  "tpu7x": Chip("tpu", int(94.75 * GIB), 1153.5e12, 300e9, 0, f"{CLOUD}/tpu7x", ("TPU7x", "v7x")),
  "h100": Chip(
    "gpu", 84978434048, 989.4e12, 450e9, 50e9, "NVIDIA H100 Tensor Core GPU (SXM)", ("H100",)
  ),
  "h200": Chip(
    "gpu", 150754820096, 989.4e12, 450e9, 50e9, "NVIDIA H200 Tensor Core GPU (SXM)", ("H200",)
  ),
}

# XLA's GpuTargetConfigProto of a Hopper GPU, from its data sheet: with it programs are compiled
# where there is none.
BANDWIDTHS = {"h100": 3352320000000, "h200": 4800000000000}  # of the memory, bytes a second
HOPPER = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "NVIDIA {name} HBM3"
"""


def description(name: str) -> str:
  """Returns what XLA is told of a GPU of this name."""
  found = CHIPS[name]
  return HOPPER.format(memory=found.memory, bandwidth=BANDWIDTHS[name], name=name.upper())


def of_kind(kind: str) -> str:
  """Returns the name of the chip that JAX calls so (Device.device_kind), '' for others."""
  lower = kind.lower()
  for name, chip in CHIPS.items():
    if any(part.lower() in lower for part in chip.kinds):
      return name
  return ""
