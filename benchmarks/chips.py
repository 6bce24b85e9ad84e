"""FramePack's update, compiled for chips that are not here: does it fit, and what does it hold?

    pip install 'jax[tpu]'     # or 'jax[cuda12]': their compilers need no chip and no driver
    python -m benchmarks.chips --config=experiments/wan_framepack.py --chip=v5p --devices=8
    python -m benchmarks.chips --config=experiments/wan_framepack.py --chip=h100 --devices=8 \
      --config.model.attention=cudnn

Nothing is run and no weight is made: shapes alone, at the experiment's own sizes. With fewer
devices than a batch is made for, --config.framepack.batch and .accumulate say how many clips an
update has and in how many parts; each device takes batch / accumulate / devices at a time. Prints
one JSON object, all sizes in GiB on one device:

    arguments, temporaries   by the compiler's own count; workspace of cuDNN's kernels is not in it
    memory, fits             of the chip; whether both are less, false where the compiler gave up
    kernels, collectives     how many calls of each the program has (a loop's body counts once)
    lower_s, compile_s       of this machine's cores
"""

import collections
import json
import os
import re
import time

from absl import flags
import jax
from jax.experimental import topologies
import numpy as np

from benchmarks import machine
from benchmarks.programs.full_size import FullSize
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import check_batch, make_mesh, replicated
from hiar_jax.parallel.rules import leaf_sharding, sharded_shapes, tree_shardings
from hiar_jax.training import framepack
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.state import create_state

GIB = 2**30
# chip -> (platform, bytes of memory; of GPUs from their data sheets, of TPUs what the compiler has)
CHIPS = {
  "h100": ("cuda", 84978434048),
  "h200": ("cuda", 150754820096),
  "v5p": ("tpu", int(95.74 * GIB)),
}
# a slice is whole hosts; of one device, the first of the smallest
SLICES = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4"}
# a GpuTargetConfigProto (XLA's), for Hopper
HOPPER = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "NVIDIA {name} HBM3"
"""


def devices_of(chip: str, count: int) -> list[jax.Device]:
  """Returns devices to compile for. Raises UserError where the compiler is not installed."""
  platform, memory = CHIPS[chip]
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else it waits for a cloud's metadata
  try:
    if platform == "cuda":
      found = topologies.get_topology_desc(
        platform="cuda",
        topology_name="any",
        target_config=HOPPER.format(memory=memory, name=chip.upper()),
        topology=f"1x1x{count}",
      )
    elif count in SLICES:
      found = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{SLICES[count]}")
    else:
      raise UserError(f"--devices={count}: expected one of {', '.join(map(str, SLICES))} of {chip}")
  except (NotImplementedError, RuntimeError) as error:
    extra = {"cuda": "cuda12", "tpu": "tpu"}[platform]
    reason = str(error).splitlines()[0]
    raise UserError(f"no compiler for {chip} ({reason}); pip install 'jax[{extra}]'") from error
  return list(found.devices)[:count]


def lower(e: Experiment, devices: list[jax.Device]) -> jax.stages.Lowered:
  """Returns the update of the framepack stage, as training/loop.py jits it."""
  if e.framepack is None:
    raise UserError("expected an experiment with framepack")
  if e.packed_adapters:
    raise UserError("framepack.lora: an update of adapters is not compiled here; set its rank to 0")
  config, network = e.framepack, e.packed_dit
  mesh = make_mesh(e.mesh, devices)
  check_batch(config.batch, config.accumulate, mesh, "framepack")
  optimizer = config.optimizer(network)
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda: create_state(key, network.init(key), optimizer))
  # made here: under the mesh its tables would be put on devices that are not there
  step = framepack.make_step(config, network, optimizer, e.latent.frames)
  run = FullSize(e, None, mesh)
  with jax.set_mesh(mesh):
    rules, least = network.sharding_rules, e.mesh.min_shard
    shardings = tree_shardings(shapes, mesh, rules, min_shard=least)
    rows, whole = leaf_sharding("batch/rows", mesh), replicated(mesh)
    placed = lambda tree, at: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree
    )
    batch = placed(run.batch(config.batch, "video"), rows)
    negative = placed(jax.ShapeDtypeStruct((1, e.text.length, e.text.dim), np.float32), whole)
    mapped = map_step(lambda mean: step, shardings, mesh)
    return mapped.lower(sharded_shapes(shapes, shardings), batch, framepack.Frozen(negative))


def compiled(lowered: jax.stages.Lowered, memory: int) -> dict:
  """Returns what the compiler says of the program on one device."""
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"fits": False, "compiler": " ".join(str(error).split())[:500]}
  found, text = program.memory_analysis(), program.as_text()
  sizes = found.argument_size_in_bytes, found.temp_size_in_bytes
  kernels = re.findall(r'custom_call_target="([^"]*(?:cudnn|tpu_custom)[^"]*)"', text)
  moves = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
  return {
    "arguments": round(sizes[0] / GIB, 2),
    "temporaries": round(sizes[1] / GIB, 2),
    "fits": sum(sizes) < memory,
    "kernels": dict(collections.Counter(kernels)),
    "collectives": dict(collections.Counter(re.findall(moves, text))),
  }


def main() -> None:
  """Compiles the update and prints the report."""
  f = flags.FLAGS
  jax.config.update("jax_platforms", "cpu")
  e, (_, memory) = build(Experiment, f.config), CHIPS[f.chip]
  devices = devices_of(f.chip, f.devices)
  start = time.perf_counter()
  lowered = lower(e, devices)
  middle = time.perf_counter()
  found = compiled(lowered, memory)
  report = {
    "benchmark": "chips",
    "chip": f.chip,
    "devices": f.devices,
    "packing": e.framepack.packing,
    "attention": e.dit.attention,
    "clips": e.framepack.batch // e.framepack.accumulate // f.devices,
    "memory": round(memory / GIB, 2),
    **found,
    "lower_s": round(middle - start, 1),
    "compile_s": round(time.perf_counter() - middle, 1),
  }
  print(json.dumps({**report, "versions": machine.versions()}, indent=2))


if __name__ == "__main__":
  configs.define_config(
    "config file; --config.KEY=VALUE overrides a number",
    Experiment,
    default="experiments/wan_framepack.py",
  )
  flags.DEFINE_enum("chip", "h100", list(CHIPS), "to compile for")
  flags.DEFINE_integer("devices", 1, "chips", 1)
  configs.run_flags(main)
