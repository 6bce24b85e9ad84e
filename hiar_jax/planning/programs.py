"""Programs of a run for given devices, ready to be lowered: updates, sampling, the decoder."""

from collections.abc import Callable
import dataclasses
import math

import jax
from jax.sharding import Mesh

from hiar_jax.errors import UserError
from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, check_batch, make_mesh, replicated
from hiar_jax.parallel.rules import Rules, leaf_sharding, sharded_shapes, tree_shardings
from hiar_jax.planning import flops
from hiar_jax.planning.abstract_run import AbstractRun, integers
from hiar_jax.planning.stage_steps import StageStep, step_of
from hiar_jax.training.experiment import Experiment
from hiar_jax.types import PyTree

shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, the shapes of its arguments by part, with their shardings, and its mesh.

  clips: videos of one call. turns: the mean number of turns of its loops of unknown length.
  """

  function: Callable
  arguments: dict[str, PyTree]
  mesh: Mesh
  clips: int
  turns: float = 1.0

  def lower(self) -> jax.stages.Lowered:
    """Returns the program as its devices' compiler is given it."""
    with jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments.values())

  def bytes_of(self, part: str) -> int:
    """Returns the bytes that one device holds of a part's arguments."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(self.arguments[part]))


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
  held = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
  return math.prod(held) * leaf.dtype.itemsize


def at(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
  """Returns shapes that all have one sharding."""
  return jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=sharding), tree)


def by_rules(tree: PyTree, mesh: Mesh, rules: Rules, min_shard: int | None = None) -> PyTree:
  """Returns weights or states with the shardings that rules give them."""
  return sharded_shapes(tree, tree_shardings(tree, mesh, rules, min_shard=min_shard))


# ------------------------------------------------------------------------------------------ updates


def update(run: AbstractRun, step: StageStep) -> Program:
  """Returns an update as training.loop jits it. Raises UserError where the devices do not divide
  the batch, and for pmap, which is not lowered before it is called.
  """
  mesh, stage, mapping = run.mesh, step.stage, run.experiment.mesh.mapping
  if mapping != "jit":
    raise UserError(f"mesh.mapping = {mapping!r} cannot be planned; expected 'jit'")
  check_batch(stage.config.batch, stage.config.accumulate, mesh, stage.name)
  least = run.experiment.mesh.min_shard
  state = by_rules(step.state, mesh, stage.rules, least)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  # made before a mesh is in use: its tables would be put on devices that are not there
  function = map_step(step.update.make_step, shardings, mesh, mapping)
  arguments = {
    "state": state,
    "batch": at(step.batch, leaf_sharding("batch/rows", mesh)),
    "frozen": _frozen(run, step, least),
  }
  # the exit level is drawn evenly: 0 to levels - 1 turns down to it
  turns = (run.method.levels - 1) / 2 if stage.name == "distill" else 1.0
  return Program(function, arguments, mesh, stage.config.batch, turns)


def _frozen(run: AbstractRun, step: StageStep, least: int) -> PyTree:
  """Texts lie on every device, weights as training.pretrained loads them."""
  if step.frozen is None:
    return None
  text, rules = run.negative.shape, run.experiment.teacher_dit.sharding_rules
  splits = tree_shardings(step.frozen, run.mesh, rules, min_shard=least)
  return jax.tree.map(
    lambda x, split: at(x, replicated(run.mesh) if x.shape == text else split), step.frozen, splits
  )


# ----------------------------------------------------------------------------------------- sampling


def trajectories(run: AbstractRun) -> Program:
  """Returns the teacher's walk of one batch, its rows split over the devices."""
  e, size = run.experiment, run.experiment.trajectories.batch
  check_batch(size, 1, run.mesh, "trajectories")
  rows = leaf_sharding("batch/rows", run.mesh)
  arguments = {
    "weights": by_rules(abstract_weights(e.dit), run.mesh, e.dit.sharding_rules, e.mesh.min_shard),
    "batch": at([run.prompts(size), integers(size), integers(size)], rows),
  }
  walk = run.teacher_sampler(run.noise_key)
  return Program(_with_list(walk), arguments, run.mesh, size)


def sampler(run: AbstractRun, dtype: str, frames: int, rows: list[PyTree], **sections) -> Program:
  """Returns the sampler of a batch: `frames` new latent frames of each video.

  dtype: of the weights. rows: what it takes beside them, texts first, a row a video; they are split
  over the devices where these divide them. sections: as Run.sampler.
  """
  e, mesh, clips = run.experiment, run.mesh, rows[0].shape[0]
  network = e.packed_dit if e.framepack else e.stored_student
  weights = by_rules(
    abstract_weights(network, dtype), mesh, network.sharding_rules, e.mesh.min_shard
  )
  rows = at(rows, leaf_sharding("batch/rows", mesh, shape=(clips,)))
  function = _with_list(run.sampler(frames, **sections))
  return Program(function, {"weights": weights, "batch": rows}, mesh, clips)


def generate(run: AbstractRun) -> Program:
  """Returns the sampler of one video of the training length."""
  e = run.experiment
  start = [run.latents(1, e.given)] if e.given else []
  rows = [run.prompts(1), integers(1), *start]
  return sampler(run, e.model.dtype, e.latent.frames - e.given, rows)


def _with_list(function: Callable) -> Callable:
  """f(weights, *rows) as one of (weights, rows)."""
  return jax.jit(lambda weights, rows: function(weights, *rows))


def decoder(run: AbstractRun) -> Program:
  """Returns one step of the decoder in the middle of a video: a latent frame, over as many devices
  as divide its width.
  """
  found, latents = run.experiment.codec.abstract_decoder(), run.latents(1, 1)
  found = dataclasses.replace(found, devices=tuple(run.mesh.devices.flat))
  split = found.place(latents.shape[3])
  # the first step has no cache and a program of its own; its result has the shape of the cache
  _, cache = jax.eval_shape(lambda p, z: found.decode(p, z, None), found.params, latents)
  arguments = {
    "weights": at(found.params, replicated(split.mesh)),
    "batch": at(latents, split),
    "cache": at(cache, split),
  }
  return Program(found.step, arguments, split.mesh, 1)


# --------------------------------------------------------------------------------- which there are


@dataclasses.dataclass(frozen=True)
class Entry:
  """exists: whether an experiment has it; lacks: why another has not. trains: it lies on the mesh
  of the experiment.
  """

  make: Callable[[AbstractRun], Program]
  exists: Callable[[Experiment], bool]
  lacks: str
  trains: bool = True


def _update(name: str) -> Callable[[AbstractRun], Program]:
  return lambda run: update(run, step_of(run, name))


def _distills(e: Experiment) -> bool:
  return e.framepack is None


def _alone(make: Callable[[AbstractRun], Program]) -> Callable[[AbstractRun], Program]:
  return lambda run: make(on_one_device(run, run.mesh.devices.flat[0]))


PROGRAMS: dict[str, Entry] = {
  "teacher": Entry(_update("teacher"), lambda e: not e.weights.base, "weights.base replaces it"),
  "trajectories": Entry(
    trajectories,
    lambda e: _distills(e) and e.needs_trajectories and not e.trajectories.pairs,
    "nothing is trained on trajectories of its own teacher",
  ),
  "causal_init": Entry(
    _update("causal_init"),
    lambda e: _distills(e) and not e.weights.student,
    "weights.student replaces it, or it trains a packed model",
  ),
  "critic": Entry(_update("critic"), _distills, "it trains a packed model"),
  "generator": Entry(_update("generator"), _distills, "it trains a packed model"),
  "framepack": Entry(_update("framepack"), lambda e: not _distills(e), "it has no group framepack"),
  "generate": Entry(_alone(generate), lambda e: True, "", trains=False),
  "vae": Entry(
    _alone(decoder),
    lambda e: e.codec.abstract_decoder() is not None,
    "its codec decodes for next to nothing",
    trains=False,
  ),
}


def chosen(e: Experiment, names: str, entries: dict[str, Entry]) -> list[str]:
  """Returns the programs of --program=NAMES, separated by commas; '' for all of the experiment.

  Raises UserError for one that is unknown, or that the experiment has not.
  """
  there = [name for name, entry in entries.items() if entry.exists(e)]
  if not names:
    return there
  asked = [name.strip() for name in names.split(",")]
  for name in asked:
    if name not in entries:
      raise UserError(f"--program={names}: unknown program {name!r}; expected {', '.join(there)}")
    if name not in there:
      raise UserError(
        f"--program={name}: this experiment has none ({entries[name].lacks}); it has "
        f"{', '.join(there)}"
      )
  return asked


def with_attention(e: Experiment, name: str) -> Experiment:
  """Returns the experiment with another attention in all of its networks."""
  changes = {
    group: dataclasses.replace(getattr(e, group), attention=name)
    for group in ("model", "teacher_model")
    if hasattr(getattr(e, group), "attention")
  }
  return dataclasses.replace(e, **changes)


def on_one_device(run: AbstractRun, device: jax.Device) -> AbstractRun:
  """Returns the run on one device, on which all of its examples lie."""
  alone = MeshConfig(data=1)
  e = dataclasses.replace(run.experiment, mesh=alone)
  return dataclasses.replace(run, experiment=e, mesh=make_mesh(alone, [device]))


def operations(run: AbstractRun, make: Callable[[AbstractRun], Program]) -> float:
  """Returns the floating-point operations of one call of a program, of all devices together.

  They are counted with attention in plain JAX, since nobody sees into a kernel.
  """
  plain = dataclasses.replace(run, experiment=with_attention(run.experiment, "blockwise"))
  program = make(on_one_device(plain, jax.devices()[0]))
  with jax.set_mesh(program.mesh):
    return flops.count(program.function, *program.arguments.values(), turns=program.turns)
