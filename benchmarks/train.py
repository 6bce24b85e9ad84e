"""Time and memory of one training update of every stage:

    python -m benchmarks.train --config=experiments/shapes.py

Each stage's own step, with its own optimizer, mapped over the devices as in training, on random
latents and texts of the experiment's sizes; reading data, the codec and the text encoder are left
out. Every update is waited for. In distillation each update draws its own exit level, as in
training, so updates differ in length. Prints one JSON object:

    compile_s       tracing and compiling, with the first update
    update_s        median, 5th and 95th percentile of the updates after it
    clips_per_s     batch / median
    peak_bytes      peak memory of the process (or of the first accelerator) so far; stages run in
                    the order printed
"""

from collections.abc import Callable, Iterator
import pathlib
import statistics
import sys
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import put_batch
from hiar_jax.parallel.rules import tree_shardings
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.stage_steps import step_of
from hiar_jax.training.device_mesh import open_mesh
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.pretrained import frozen_of
from hiar_jax.training.state import TrainState
from hiar_jax.types import Batch, Params, PyTree

STAGES = ("teacher", "causal_init", "critic", "generator")


def drawn(shapes: PyTree) -> PyTree:
  """Returns a random batch: normal numbers, and an index for each example."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if leaf.dtype != np.int32:
      return rng.standard_normal(leaf.shape, np.float32)
    indices = path[-1].key == "example_id"
    return np.arange(*leaf.shape, dtype=np.int32) if indices else np.zeros(leaf.shape, np.int32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def frozen_weights(e: Experiment, name: str) -> Params:
  """Returns random ones in place of those that training loads."""
  network, dtype = frozen_of(e, name)
  init = jax.jit(lambda: jax.tree.map(lambda x: x.astype(dtype), network.init(jax.random.key(2))))
  return init()


def measure(e: Experiment, name: str, updates: int) -> dict:
  """Times `updates` updates of a stage after its first."""
  mesh = open_mesh(e)
  with jax.set_mesh(mesh):
    run = AbstractRun(e, pathlib.Path(), mesh)
    found = step_of(run, name)
    stage, update = found.stage, found.update
    initial = lambda: stage.create(
      *(e.network_of(start).init(jax.random.key(i)) for i, start in enumerate(stage.starts))
    )
    # Initialised in its shards: the whole state may not fit on one device.
    shardings = tree_shardings(found.state, mesh, stage.rules, min_shard=e.mesh.min_shard)
    state = jax.block_until_ready(jax.jit(initial, out_shardings=shardings)())
    batch = put_batch(drawn(found.batch), mesh)
    weights = (frozen_weights(e, read) for read in update.reads)
    frozen = update.frozen and update.frozen(jnp.zeros(run.negative.shape), *weights)
    step = map_step(update.make_step, shardings, mesh, e.mesh.mapping)
    times = list(timed(step, state, batch, frozen, updates))
  low, median, high = np.percentile(times[1:], (5, 50, 95))
  return {
    "compile_s": round(times[0], 2),
    "update_s": {"median": round(median, 4), "p5": round(low, 4), "p95": round(high, 4)},
    "mean_s": round(statistics.fmean(times[1:]), 4),
    "batch": stage.config.batch,
    "clips_per_s": round(stage.config.batch / median, 2),
    "peak_bytes": machine.peak_bytes(),
  }


def timed(
  step: Callable, state: TrainState, batch: Batch, frozen: PyTree, updates: int
) -> Iterator[float]:
  """Yields the seconds of each update, the first of them with compilation."""
  for count in range(updates + 1):
    # The step's random key is folded with state.step, which generator steps do not advance: set it,
    # so that every update draws its own exit level.
    state = state.replace(step=jnp.full((), count, jnp.int32))
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch, frozen))
    yield time.perf_counter() - start
  if not all(np.isfinite(float(value)) for value in metrics.values()):
    print(f"not finite after {updates} updates on noise: {metrics}", file=sys.stderr)


def main() -> None:
  """Measures the stages and prints the report."""
  f = flags.FLAGS
  e, stages = build(Experiment, f.config), {}
  for name in f.stages:
    print(name, file=sys.stderr)
    stages[name] = measure(e, name, f.updates)
  found = {"benchmark": "train", "config": to_json(f.config), "stages": stages}
  print(machine.report(found))


if __name__ == "__main__":
  configs.define_config(
    "the experiment whose updates are timed", Experiment, default="experiments/shapes.py"
  )
  flags.DEFINE_integer("updates", 40, "timed updates of each stage", 2)
  flags.DEFINE_multi_enum(
    "stages", list(STAGES), STAGES, "stages to time; repeat the flag for several"
  )
  configs.run_flags(main)
