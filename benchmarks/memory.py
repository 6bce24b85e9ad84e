"""Planned memory against what a program takes:

    python -m benchmarks.memory --config=experiments/shapes.py --program=teacher \
      --config.teacher.batch=512

Each program is compiled in one process, as hiar_jax.plan does, and run in a fresh one that loads
it, fills its arguments and calls it once: nothing of the compiler is in there. Prints one JSON
object, bytes of one device:

    arguments     the loaded state, as planned
    planned       temporaries + results that take no argument's place, by the compiler
    measured      the peak while it ran over what was held before (resident memory on a CPU, Linux;
                  a device's own count where it keeps one)
    ratio         measured / planned
"""

import pathlib
import pickle
import subprocess
import sys
import tempfile

from absl import flags
import jax
from jax.experimental import serialize_executable
import jax.numpy as jnp

from benchmarks import machine
from hiar_jax import peak_memory, plan
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning import programs
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.training.experiment import Experiment


def compile_ahead(e: Experiment, name: str, path: pathlib.Path) -> dict:
  """Writes a program for the first device here, compiled, and returns its planned bytes."""
  device = jax.devices()[0]
  run = AbstractRun(e, pathlib.Path(), make_mesh(MeshConfig(data=1), [device]))
  program = plan.ENTRIES[name].make(programs.on_one_device(run, device))
  executable = program.lower().compile()
  shapes = jax.tree.map(_described, tuple(program.arguments.values()))
  path.write_bytes(pickle.dumps((serialize_executable.serialize(executable), shapes)))
  counted = executable.memory_analysis()
  results = counted.output_size_in_bytes - counted.alias_size_in_bytes
  planned = counted.temp_size_in_bytes + results
  return {"arguments": counted.argument_size_in_bytes, "planned": planned}


def _described(leaf: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], str]:
  key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return leaf.shape, "key" if key else str(leaf.dtype)


def _filled(described: tuple[tuple[int, ...], str]) -> jax.Array:
  """Returns an array whose memory was written, as a loaded one's is."""
  shape, dtype = described
  if dtype == "key":
    return jnp.broadcast_to(jax.random.key(0), shape)
  return jnp.full(shape, 0 if dtype.startswith(("int", "uint")) else 0.01, dtype)


def run_once(path: pathlib.Path) -> int:
  """Loads and runs a program that compile_ahead wrote; returns the bytes of its peak over what was
  held before it ran.
  """
  compiled, shapes = pickle.loads(path.read_bytes())
  call = serialize_executable.deserialize_and_load(*compiled)
  is_described = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)
  arguments = jax.block_until_ready(jax.tree.map(_filled, shapes, is_leaf=is_described))
  del compiled
  before = _held()
  jax.block_until_ready(call(*arguments))
  return machine.peak_bytes() - before


def _held() -> int:
  """Returns the bytes that are held now, from which the peak is counted anew where it can be."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_in_use" in stats:
    return stats["bytes_in_use"]
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
  return peak_memory.peak()[1]


def compare(e: Experiment, name: str) -> dict:
  """Returns a program's planned and measured bytes; the measured ones by a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "program")
    found = compile_ahead(e, name, path)
    command = [sys.executable, "-m", "benchmarks.memory", f"--run={path}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  measured = int(done.stdout)
  return {**found, "measured": measured, "ratio": round(measured / found["planned"], 3)}


def main() -> None:
  """Compares programs and prints the report, or runs one."""
  f = flags.FLAGS
  if f.run:
    print(run_once(pathlib.Path(f.run)))
    return
  e, found = build(Experiment, f.config), {}
  for name in programs.chosen(e, f.program, plan.ENTRIES):
    print(name, file=sys.stderr)
    found[name] = compare(e, name)
  report = {"benchmark": "memory", "config": to_json(f.config), "programs": found}
  print(machine.report(report))


if __name__ == "__main__":
  configs.define_config(
    "the experiment whose programs are run", Experiment, default="experiments/shapes.py"
  )
  flags.DEFINE_string("program", "", f"some of {', '.join(plan.ENTRIES)}; empty: all that it has")
  flags.DEFINE_string("run", "", "a compiled program: runs it and prints its bytes")
  configs.run_flags(main)
