"""Stage 2: the bidirectional teacher, trained on the clips."""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.training_state import load_params
from hiar_jax.data.pipeline import read_captions
from hiar_jax.errors import UserError
from hiar_jax.models import dit
from hiar_jax.parallel.mesh import map_step, state_shardings
from hiar_jax.rollout import teacher_sampler
from hiar_jax.training import loop, teacher
from hiar_jax.training.run import Run
from hiar_jax.training.state import create, example_keys, example_normal
from hiar_jax.types import Params, PyTree


def run(run: Run) -> None:
  """Writes <workdir>/teacher; nothing where weights.base stands for it."""
  e = run.experiment
  if e.weights.base or loop.is_done(run, "teacher", e.teacher.steps):
    return
  key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(e.seed), 1))
  step = teacher.make_step(e.teacher, e.dit, run.task)
  walk, tokens = make_walk(run, jax.random.key(e.seed)), preview_tokens(run)

  def update(shardings):
    mapped = map_step(step, shardings, run.mesh, e.mesh.mapping)
    return lambda state, feeds, _: mapped(state, feeds.next("clips"))

  loop.train(
    run,
    "teacher",
    e.teacher,
    create=lambda: create(key_train, dit.init(e.dit, key_init), e.teacher.optimizer()),
    update=update,
    feeds=loop.Feeds(run, clips=run.clips("data", e.teacher.batch, ("video",), salt=1)),
    preview=lambda state: run.pixels(walk(state.ema, tokens, np.arange(len(tokens)))[:, -1]),
  )


def load(run: Run) -> Params:
  """The bidirectional model of the student's size: this stage's, or weights.base."""
  return load_weights(run, "teacher")


def load_real(run: Run) -> Params:
  """The real score of distribution matching: weights.teacher, or `load`."""
  e = run.experiment
  return (
    published(run, e.weights.teacher, e.teacher_dit, e.teacher_dit.dtype)
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
    return published(run, directory, e.dit)
  shapes = jax.eval_shape(lambda: dit.init(e.dit, jax.random.key(0)))
  return load_params(run.directory(stage) / "checkpoints", _placed(run, shapes))


def _placed(run: Run, shapes: PyTree) -> PyTree:
  """Large leaves are cut over the mesh's fsdp axis, as those that train are."""
  shardings = state_shardings(shapes, run.mesh, run.experiment.mesh.min_shard)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def published(run: Run, directory: str, expected: dit.DiTConfig, dtype: str = "float32") -> Params:
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


def preview_tokens(run: Run, count: int = 8) -> np.ndarray:
  """Prompts for sample frames: held-out ones of the shapes world, else the first captions of the
  data.
  """
  if run.experiment.data.source == "shapes":
    prompts = run.held_out(count)
  else:
    prompts = read_captions(run.directory("data"))[:count]
  return run.tokens(prompts)


def make_walk(run: Run, key: jax.Array):
  """walk(params, tokens [b l], index [b], start [b] = 0) -> the teacher's guided trajectories at
  the student's timesteps [b s+1 f h w c].

  index: of each example, for its noise; an example's trajectory does not depend on those beside it.
  start: of each clip in its video.
  """
  e = run.experiment
  sigmas = jnp.asarray(
    flow.sigma_schedule(e.trajectories.steps, e.trajectories.shift or e.student.shift), jnp.float32
  )
  keep = e.trajectories.kept(e.student)

  def call(params, tokens, index, start=None):
    text = run.task.embed(tokens)
    eps = example_normal(example_keys(key, index), run.task.clip)
    forward, negative = (
      dit.bind(e.dit, params, of, start) for of in (text, run.task.negative(text))
    )
    return teacher_sampler.trajectory(forward, negative, eps, sigmas, keep, e.trajectories.guidance)

  return jax.jit(call)
