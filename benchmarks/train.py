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
import functools
import json
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
from hiar_jax.training import causal_init, distill, teacher
from hiar_jax.training.device_mesh import open_mesh
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.state import TrainConfig, TrainState, create_state
from hiar_jax.types import Batch, Params, PyTree

STAGES = ("teacher", "causal_init", "critic", "generator")


def batch_of(e: Experiment, training: TrainConfig) -> Batch:
  """Returns a random batch with the keys of every stage, encoded."""
  rng = np.random.default_rng(0)
  clip, count = e.latent.clip, training.batch
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  clips = {
    "text": draw(count, e.text.length, e.text.dim),
    "example_id": np.arange(count, dtype=np.int32),
  }
  if e.model.place_embedding:
    clips["start"] = np.zeros(count, np.int32)
  trajectory = draw(count, len(e.student.sigmas), *clip)
  return {
    **clips,
    "latents": draw(count, *clip),
    "trajectory": trajectory,
    "trajectories": {**clips, "trajectory": trajectory},
  }


def stage(e: Experiment, name: str) -> tuple[TrainConfig, Callable[[Params], TrainState], Callable]:
  """Returns (settings, params -> initial state, make_step of parallel.mapping)."""
  key = jax.random.key(1)
  if name == "teacher":
    optimizer = e.teacher.optimizer(e.dit)
    make_step = functools.partial(teacher.make_step, e.teacher, e.dit, optimizer)
    return e.teacher, lambda params: create_state(key, params, optimizer), make_step
  if name == "causal_init":
    config, optimizer = e.causal_init, e.causal_init.optimizer(e.student_dit)
    make_step = functools.partial(
      causal_init.make_step, config, e.student_dit, e.history, e.student.sigmas, optimizer
    )
    return config, lambda params: create_state(key, params, optimizer), make_step
  networks = distill.Networks(student=e.student_dit, critic=e.dit, teacher=e.teacher_dit)
  optimizers = {
    "generator": e.distill.generator_optimizer(e.student_dit),
    "critic": e.distill.critic_optimizer(e.dit),
  }
  make = {"critic": distill.make_critic_step, "generator": distill.make_generator_step}[name]
  method = e.history.at(e.student.sigmas)
  make_step = functools.partial(make, e.distill, networks, method, e.latent, optimizers[name])
  # The critic is a copy: buffers of the state are donated, so none may occur in it twice.
  fresh = lambda params: create_state(
    key, params, optimizers["generator"], jax.tree.map(jnp.copy, params), optimizers["critic"]
  )
  return e.distill, fresh, make_step


def frozen_of(e: Experiment, name: str):
  """Returns what the step of a stage reads and does not train."""
  negative = jnp.zeros((1, e.text.length, e.text.dim))
  if name == "teacher":
    return negative
  if name == "generator":
    return distill.Frozen(jax.jit(lambda: e.teacher_dit.init(jax.random.key(2)))(), negative)
  return None


def measure(e: Experiment, name: str, updates: int) -> dict:
  """Times `updates` updates of a stage after its first."""
  mesh = open_mesh(e)
  with jax.set_mesh(mesh):
    training, fresh, make_step = stage(e, name)
    initial = lambda: fresh(e.dit.init(jax.random.key(0)))
    # Initialised in its shards: the whole state may not fit on one device.
    shapes, rules = jax.eval_shape(initial), e.dit.sharding_rules
    shardings = tree_shardings(shapes, mesh, rules, min_shard=e.mesh.min_shard)
    state = jax.block_until_ready(jax.jit(initial, out_shardings=shardings)())
    batch = put_batch(batch_of(e, training), mesh)
    step = map_step(make_step, shardings, mesh, e.mesh.mapping)
    times = list(timed(step, state, batch, frozen_of(e, name), updates))
  low, median, high = np.percentile(times[1:], (5, 50, 95))
  return {
    "compile_s": round(times[0], 2),
    "update_s": {"median": round(median, 4), "p5": round(low, 4), "p95": round(high, 4)},
    "mean_s": round(statistics.fmean(times[1:]), 4),
    "batch": training.batch,
    "clips_per_s": round(training.batch / median, 2),
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
  print(
    json.dumps({**found, "hardware": machine.hardware(), "versions": machine.versions()}, indent=2)
  )


if __name__ == "__main__":
  configs.define_config(
    "the experiment whose updates are timed", Experiment, default="experiments/shapes.py"
  )
  flags.DEFINE_integer("updates", 40, "timed updates of each stage", 2)
  flags.DEFINE_multi_enum(
    "stages", list(STAGES), STAGES, "stages to time; repeat the flag for several"
  )
  configs.run_flags(main)
