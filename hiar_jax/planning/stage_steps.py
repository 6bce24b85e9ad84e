"""The training programs of a run, of shapes alone: what training.stages gives to training.loop."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax.parallel.rules import Rules
from hiar_jax.planning.abstract_run import AbstractRun, weights_of
from hiar_jax.training import causal_init, distill, framepack, teacher
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.stages import KEY_OFFSETS, with_packed_past
from hiar_jax.training.state import TrainConfig, create_state
from hiar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class StageStep:
  """One kind of update.

  stage: the config's group. make_step: make_step(mean=...) -> step(state, batch, frozen). create:
  the first state, of the weights `starts`; batch, frozen: shapes of the step's other arguments.
  rules: those by which the state is split over devices.
  """

  stage: str
  config: TrainConfig
  make_step: Callable
  create: Callable[..., PyTree]
  starts: tuple[PyTree, ...]
  batch: PyTree
  frozen: PyTree
  rules: Rules

  @property
  def state(self) -> PyTree:
    """The shapes of the state."""
    return jax.eval_shape(self.create, *self.starts)


def _key(e: Experiment, stage: str) -> jax.Array:
  return jax.random.fold_in(jax.random.key(e.seed), KEY_OFFSETS[stage])


def teacher_step(run: AbstractRun) -> StageStep:
  """Returns the update of the teacher."""
  e, config = run.experiment, run.experiment.teacher
  key_init, key_train = jax.random.split(_key(e, "teacher"))
  optimizer = config.optimizer(e.dit)
  return StageStep(
    "teacher",
    config,
    functools.partial(teacher.make_step, config, e.dit, optimizer),
    create=lambda: create_state(key_train, e.dit.init(key_init), optimizer),
    starts=(),
    batch=run.batch(config.batch, "video"),
    frozen=run.negative,
    rules=e.dit.sharding_rules,
  )


def causal_init_step(run: AbstractRun) -> StageStep:
  """Returns the update of causal init."""
  e, config = run.experiment, run.experiment.causal_init
  key, optimizer = _key(e, "causal_init"), config.optimizer(e.student_dit)
  return StageStep(
    "causal_init",
    config,
    functools.partial(
      causal_init.make_step, config, e.student_dit, e.history, run.point_sigmas, optimizer
    ),
    create=lambda weights: create_state(key, with_packed_past(e, weights), optimizer),
    starts=(weights_of(e.dit),),
    batch=run.batch(config.batch, "trajectory"),
    frozen=None,
    rules=e.stored_student.sharding_rules,
  )


def _distillation(run: AbstractRun) -> tuple[dict[str, Any], tuple]:
  """Returns what both steps of distillation have in common, and the arguments of their makers."""
  e, config = run.experiment, run.experiment.distill
  key = _key(e, "distill")
  optimizers = config.generator_optimizer(e.student_dit), config.critic_optimizer(e.dit)
  common = dict(
    stage="distill",
    config=config,
    create=lambda student, critic: create_state(key, student, optimizers[0], critic, optimizers[1]),
    starts=(weights_of(e.stored_student), weights_of(e.dit)),
    rules=e.stored_student.sharding_rules,
  )
  networks = distill.Networks(student=e.student_dit, critic=e.dit, teacher=e.teacher_dit)
  return common, (config, networks, run.method, e.latent)


def critic_step(run: AbstractRun) -> StageStep:
  """Returns the critic's update in distillation."""
  e, config = run.experiment, run.experiment.distill
  common, makers = _distillation(run)
  return StageStep(
    **common,
    make_step=functools.partial(distill.make_critic_step, *makers, config.critic_optimizer(e.dit)),
    batch=run.batch(config.batch),
    frozen=None,
  )


def generator_step(run: AbstractRun) -> StageStep:
  """Returns the generator's update in distillation."""
  e, config = run.experiment, run.experiment.distill
  common, makers = _distillation(run)
  batch = run.batch(config.batch)
  if config.forward_kl.weight:
    batch["trajectories"] = run.batch(config.batch, "trajectory")
  return StageStep(
    **common,
    make_step=functools.partial(
      distill.make_generator_step,
      *makers,
      config.generator_optimizer(e.student_dit),
      point_sigmas=jnp.asarray(run.point_sigmas),
    ),
    batch=batch,
    frozen=distill.Frozen(weights_of(e.teacher_dit, e.teacher_dit.dtype), run.negative),
  )


def framepack_step(run: AbstractRun) -> StageStep:
  """Returns the update of a packed model: of all weights, or of adapters."""
  e, config, network = run.experiment, run.experiment.framepack, run.experiment.packed_dit
  key, adapters = _key(e, "framepack"), run.experiment.packed_adapters
  optimizer = config.optimizer(adapters or network)
  start = weights_of(e.dit)

  def create(weights):
    params = network.with_projections(weights)
    params = adapters.start(jax.random.fold_in(key, 0), params) if adapters else params
    return create_state(key, params, optimizer)

  base = adapters and jax.eval_shape(
    lambda weights: adapters.frozen(network.with_projections(weights)), start
  )
  return StageStep(
    "framepack",
    config,
    functools.partial(
      framepack.make_step,
      config,
      network,
      optimizer,
      e.latent.frames,
      codebook=run.codebook,
      adapters=adapters,
    ),
    create=create,
    starts=(start,),
    batch=run.batch(config.batch, "video"),
    frozen=framepack.Frozen(run.negative, base),
    rules=(adapters or network).sharding_rules,
  )


# name of a program -> its update
STEPS: dict[str, Callable[[AbstractRun], StageStep]] = {
  "teacher": teacher_step,
  "causal_init": causal_init_step,
  "critic": critic_step,
  "generator": generator_step,
  "framepack": framepack_step,
}
