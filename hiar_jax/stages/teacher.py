"""Stage 2: the bidirectional teacher, trained on the clips."""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow, sharding
from hiar_jax.checkpoint import load_params
from hiar_jax.data.pipeline import read_captions
from hiar_jax.models import dit
from hiar_jax.rollout import bidirectional
from hiar_jax.stages import loop
from hiar_jax.stages.run import Run
from hiar_jax.state import create, example_keys, example_normal
from hiar_jax.steps import teacher
from hiar_jax.types import Params


def run(run: Run) -> None:
  """Writes <workdir>/teacher."""
  e = run.experiment
  if loop.is_done(run, "teacher", e.teacher.steps):
    return
  key_init, key_train = jax.random.split(jax.random.fold_in(jax.random.key(e.seed), 1))
  step = teacher.make_step(e.teacher, e.dit, run.task)
  walk, tokens = make_walk(run, jax.random.key(e.seed)), preview_tokens(run)

  def update(shardings):
    mapped = sharding.map_step(step, shardings, run.mesh, e.mesh.mapping)
    return lambda state, feeds, _: mapped(state, feeds.next("clips"))

  loop.train(
    run, "teacher", e.teacher,
    create=lambda: create(key_train, dit.init(e.dit, key_init), e.teacher.optimizer()),
    update=update,
    feeds=loop.Feeds(run, clips=run.clips("data", e.teacher.batch, ("video",), salt=1)),
    preview=lambda state: run.pixels(walk(state.ema, tokens, np.arange(len(tokens)))[:, -1]),
  )  # fmt: skip


def load(run: Run) -> Params:
  """The teacher's averaged weights."""
  return load_weights(run, "teacher")


def load_weights(run: Run, stage: str) -> Params:
  """The averaged weights of a stage, replicated over the devices."""
  shapes = jax.eval_shape(lambda: dit.init(run.experiment.dit, jax.random.key(0)))
  everywhere = sharding.replicated(run.mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
  return load_params(run.directory(stage) / "checkpoints", abstract)


def preview_tokens(run: Run, count: int = 8) -> np.ndarray:
  """Prompts for sample frames: held-out ones of the shapes world, else the first captions of the data."""
  if run.experiment.data.source == "shapes":
    prompts = run.held_out(count)
  else:
    prompts = read_captions(run.directory("data"))[:count]
  return np.stack([run.tokenizer(prompt) for prompt in prompts])


def make_walk(run: Run, key: jax.Array):
  """walk(params, tokens [b l], index [b]) -> the teacher's guided trajectories at the student's levels [b s+1 f h w c].

  index: of each example, for its noise; an example's trajectory does not depend on those beside it.
  """
  e = run.experiment
  sigmas = jnp.asarray(flow.sigma_schedule(e.trajectories.steps, e.student.shift), jnp.float32)
  keep = e.trajectories.kept(e.student)

  def call(params, tokens, index):
    text = run.task.embed(tokens)
    eps = example_normal(example_keys(key, index), run.task.clip)
    forward, negative = dit.bind(e.dit, params, text), dit.bind(e.dit, params, run.task.negative(text))
    return bidirectional.trajectory(forward, negative, eps, sigmas, keep, e.trajectories.guidance)

  return jax.jit(call)
