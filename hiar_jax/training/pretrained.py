"""Weights that a stage starts from: those of the stages before it, or published ones that stand for
them.
"""

import jax

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.training_state import load_params
from hiar_jax.errors import UserError
from hiar_jax.models import dit
from hiar_jax.parallel.rules import state_shardings
from hiar_jax.training.run import Run
from hiar_jax.types import Params, PyTree


def load(run: Run) -> Params:
  """The bidirectional model of the student's size: this stage's, or weights.base."""
  return load_weights(run, "teacher")


def load_real(run: Run) -> Params:
  """The real score of distribution matching: weights.teacher, or `load`."""
  e = run.experiment
  return (
    load_published(run, e.weights.teacher, e.teacher_dit, e.teacher_dit.dtype)
    if e.weights.teacher
    else load(run)
  )


def load_weights(run: Run, stage: str) -> Params:
  """The averaged weights of a stage, or the published ones that stand for them, placed over the
  devices.
  """
  e = run.experiment
  directory = {"teacher": e.weights.base, "causal_init": e.weights.student}.get(stage)
  if directory:
    return load_published(run, directory, e.dit)
  shapes = jax.eval_shape(lambda: dit.init(e.dit, jax.random.key(0)))
  return load_params(run.directory(stage) / "checkpoints", _placed(run, shapes))


def _placed(run: Run, shapes: PyTree) -> PyTree:
  """Large leaves are cut over the mesh's fsdp axis, as those that train are."""
  shardings = state_shardings(shapes, run.mesh, run.experiment.mesh.min_shard)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def load_published(
  run: Run, directory: str, expected: dit.DiTConfig, dtype: str = "float32"
) -> Params:
  """Converted weights, which must have the sizes that the config says; float32 where they are to be
  trained.
  """
  found = weights.read_config(directory, "dit")
  different = [name for name in SIZES if getattr(found, name) != getattr(expected, name)]
  if different:
    lines = ", ".join(
      f"{name} {getattr(found, name)}, not {getattr(expected, name)}" for name in different
    )
    raise UserError(
      f"{directory} holds another model than the config describes: {lines}; give the weights of "
      "this size"
    )
  place = lambda shapes: state_shardings(shapes, run.mesh, run.experiment.mesh.min_shard)
  return weights.load(directory, "dit", dtype=dtype, sharding=place)[1]


SIZES = (
  "dim",
  "ffn_dim",
  "num_heads",
  "num_layers",
  "patch",
  "channels",
  "text_dim",
  "freq_dim",
  "place_embedding",
)
