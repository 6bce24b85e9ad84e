"""What XLA's excess precision does to a network in bfloat16, on one device and on several:

    python -m benchmarks.precision --config=experiments/shapes.py --config.model.dtype=bfloat16

By default XLA may leave out a rounding to 16 bits between two operations that it joins, and which
ones it joins depends on shapes, hence on devices. `XLA_FLAGS=--xla_allow_excess_precision=false`
keeps all. Both settings run in processes of their own, on one device and on several (virtual ones
on a CPU), from the same weights and batch. Prints one JSON object, for each setting:

    forward, update    bit_equal: the share of numbers that are the same on one and on several
                       devices, of the student's velocities and of its weights after `updates`
                       updates of causal init; apart: the RMS of the difference over the RMS of
                       the numbers (of what the updates changed, for the weights)
    update_s           median seconds of an update on one device, without compiling
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from benchmarks import machine
from benchmarks.train import drawn
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError
from hiar_jax.models.frames import bind, whole_clip
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import make_mesh, put_batch
from hiar_jax.parallel.rules import tree_shardings
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.stage_steps import step_of
from hiar_jax.training.experiment import Experiment
from hiar_jax.types import Params


def compute(e: Experiment, devices: int, updates: int) -> dict[str, np.ndarray]:
  """Returns velocities, weights before and after the updates, and the seconds of each update.

  Raises UserError where there are fewer devices.
  """
  if jax.device_count() < devices:
    raise UserError(f"--devices={devices}: there are {jax.device_count()}")
  mesh, times = make_mesh(e.mesh, jax.devices()[:devices]), []
  found = step_of(AbstractRun(e, pathlib.Path(), mesh), "causal_init")
  with jax.set_mesh(mesh):
    initial = lambda: found.stage.create(_trained(e.dit.init(jax.random.key(0))))
    shardings = tree_shardings(found.state, mesh, found.stage.rules, min_shard=e.mesh.min_shard)
    state = jax.block_until_ready(jax.jit(initial, out_shardings=shardings)())
    batch = put_batch(drawn(found.batch), mesh)

    @jax.jit
    def forward(params, batch):
      bound = bind(e.student_dit, params, batch["text"], batch.get("start"))
      return bound(whole_clip(batch["trajectory"][:, 0], 0.7)).velocity[0]

    result = {"forward": forward(state.params, batch), "before": _flat(state.params)}
    step = map_step(found.update.make_step, shardings, mesh, e.mesh.mapping)
    for _ in range(updates + 1):
      start = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, batch, None))
      times.append(time.perf_counter() - start)
    result |= {"update": _flat(state.params), "times": np.asarray(times[1:])}
  return jax.device_get(result)


def _trained(params: Params) -> Params:
  """Stands for trained weights: none is zero, as the last layer's are at first."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  draw = lambda key, leaf: leaf + 0.02 * jax.random.normal(key, leaf.shape)
  return tree.unflatten(map(draw, keys, leaves))


def _flat(params: Params) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(params))])


def compared(one: dict[str, np.ndarray], several: dict[str, np.ndarray]) -> dict:
  """Returns how far several devices are from one."""
  found = {}
  for name, scale in (("forward", one["forward"]), ("update", one["update"] - one["before"])):
    difference = (one[name] - several[name]).astype(np.float64)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    found[name] = {
      "bit_equal": round(float(np.mean(difference == 0)), 4),
      "apart": float(f"{rms(difference) / rms(scale):.3g}"),
    }
  return {**found, "update_s": round(float(statistics.median(one["times"])), 4)}


def in_process(excess: bool, devices: int) -> dict[str, np.ndarray]:
  """Returns what `compute` finds in a process of its own, with the flags of this one."""
  said = os.environ.get("XLA_FLAGS", "")
  said += f" --xla_allow_excess_precision={str(excess).lower()}"
  # on a CPU they are virtual ones
  settings = {"XLA_FLAGS": said.strip(), "JAX_NUM_CPU_DEVICES": str(devices)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "found.npz")
    mine = [f"--devices={devices}", f"--write={path}"]
    command = [sys.executable, "-m", "benchmarks.precision", *sys.argv[1:], *mine]
    subprocess.run(command, env=os.environ | settings, check=True)
    with np.load(path) as found:
      return dict(found)


def main() -> None:
  """Compares both settings and prints the report, or computes under one."""
  f = flags.FLAGS
  e = build(Experiment, f.config)
  if f.write:
    np.savez(f.write, **compute(e, f.devices, f.updates))
    return
  found = {}
  for excess in (True, False):
    print(f"xla_allow_excess_precision={excess}", file=sys.stderr)
    found[str(excess).lower()] = compared(*(in_process(excess, n) for n in (1, f.devices)))
  report = {"benchmark": "precision", "config": to_json(f.config), "excess_precision": found}
  print(machine.report(report))


if __name__ == "__main__":
  configs.define_config(
    "the experiment whose network is run", Experiment, default="experiments/shapes.py"
  )
  flags.DEFINE_integer("devices", 8, "of the second process", 1)
  flags.DEFINE_integer("updates", 5, "of causal init, behind the first", 1)
  flags.DEFINE_string("write", "", "computes here and writes a file")
  configs.run_flags(main)
