"""The trained stages, each defined once: what it starts from, reads and does, with nothing loaded.

training.stages loads the weights and runs a stage with training.loop; planning lowers its updates
of shapes alone.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp

from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.rules import Rules
from hiar_jax.rollout.noise import seed_key
from hiar_jax.training import causal_init, distill, framepack, teacher
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import Run
from hiar_jax.training.state import TrainConfig, TrainState, create_state
from hiar_jax.types import Params, PyTree

# Folded into the seed, so that no two stages draw the same numbers; 3 is that of run.sampler.
KEY_OFFSETS = {
  "teacher": 1,
  "trajectories": 2,
  "causal_init": 4,
  "distill": 5,
  "framepack": 6,
  "codebook": 7,
}


def stage_key(e: Experiment, stage: str) -> jax.Array:
  """Returns the key of what a stage draws."""
  return jax.random.fold_in(seed_key(e.seed_of(stage)), KEY_OFFSETS[stage])


@dataclasses.dataclass(frozen=True)
class Feed:
  """Batches of a stage's data set: its fields beside the tokens, and the salt of its order
  (Run.clips).
  """

  stage: str
  keys: tuple[str, ...]
  salt: int


@dataclasses.dataclass(frozen=True)
class Update:
  """One kind of update of a stage.

  make_step: make_step(mean=...) -> step(state, batch, frozen) -> (state, metrics), for map_step.
  feeds: the first gives the batch, which the others join under their names. frozen: (negative,
  *weights) -> the arrays that nobody trains, of the negative text and of the weights that `reads`
  names (pretrained.load_frozen); None: the step has none. name: goes before its metrics' names.
  due: step -> whether it comes in that step; None: in every one.
  """

  make_step: Callable
  feeds: tuple[str, ...]
  reads: tuple[str, ...] = ()
  frozen: Callable[..., PyTree] | None = None
  name: str = ""
  due: Callable[[int], bool] | None = None

  def named(self, metrics: Mapping) -> dict:
    """Returns the metrics under the names that are logged."""
    return {f"{self.name}_{name}" if self.name else name: x for name, x in metrics.items()}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A trained stage.

  name: the config's group. create: the first state, of the weights of the stages `starts`. rules:
  those by which the state is split over devices. feeds: batches by name. updates: see
  loop.run_stage.
  """

  name: str
  config: TrainConfig
  create: Callable[..., TrainState]
  rules: Rules
  feeds: Mapping[str, Feed]
  updates: tuple[Update, ...]
  starts: tuple[str, ...] = ()


def of_teacher(run: Run) -> Stage:
  """Returns the training of the bidirectional model."""
  e, config = run.experiment, run.experiment.teacher
  key_init, key_train = jax.random.split(stage_key(e, "teacher"))
  optimizer = config.optimizer(e.dit)
  make_step = functools.partial(teacher.make_step, config, e.dit, optimizer)
  return Stage(
    "teacher",
    config,
    create=lambda: create_state(key_train, e.dit.init(key_init), optimizer),
    rules=e.dit.sharding_rules,
    feeds={"clips": Feed("data", ("video",), salt=1)},
    updates=(Update(make_step, ("clips",), frozen=lambda negative: negative),),
  )


def of_causal_init(run: Run) -> Stage:
  """Returns the student's first training, on the teacher's trajectories."""
  e, config = run.experiment, run.experiment.causal_init
  key, optimizer = stage_key(e, "causal_init"), config.optimizer(e.student_dit)
  make_step = functools.partial(
    causal_init.make_step, config, e.student_dit, e.history, run.point_sigmas, optimizer
  )
  return Stage(
    "causal_init",
    config,
    create=lambda weights: create_state(key, _with_packed_past(e, weights), optimizer),
    starts=("teacher",),
    rules=e.stored_student.sharding_rules,
    feeds={"trajectories": Feed("trajectories", ("trajectory",), salt=4)},
    updates=(Update(make_step, ("trajectories",)),),
  )


def _with_packed_past(e: Experiment, params: Params) -> Params:
  """Returns the student's first parameters, with the projections of its packed past if any."""
  network = e.stored_student
  return params if network == e.dit else network.with_projections(params)


def of_distillation(run: Run) -> Stage:
  """Returns the training of student and critic. The student starts from causal init and the critic
  from the teacher, or both from published weights.
  """
  e, config, adapters = run.experiment, run.experiment.distill, run.experiment.critic_adapters
  key = stage_key(e, "distill")
  optimizers = config.generator_optimizer(e.student_dit), config.critic_optimizer(adapters or e.dit)
  feeds = {"prompts": Feed("data", (), salt=5)}
  if config.forward_kl.weight:
    feeds["trajectories"] = Feed("trajectories", ("trajectory",), salt=6)
  networks = distill.Networks(e.student_dit, critic=e.dit, teacher=e.teacher_dit, adapters=adapters)
  common = config, networks, run.method, e.latent
  generator = functools.partial(
    distill.make_generator_step,
    *common,
    optimizers[0],
    point_sigmas=jnp.asarray(run.point_sigmas),
  )
  critic = functools.partial(distill.make_critic_step, *common, optimizers[1])
  # the weights beside the critic's adapters, if those are not the real score's
  base = ("critic",) if adapters and not e.one_score else ()

  def create(student: Params, *weights: Params) -> TrainState:
    if adapters:
      shapes = abstract_weights(adapters.network)
      # `steps`: no update draws from its fold_in
      weights = (adapters.start(jax.random.fold_in(key, config.steps), shapes),)
    student = _with_packed_past(e, student)
    return create_state(key, student, optimizers[0], *weights, optimizers[1])

  return Stage(
    "distill",
    config,
    create=create,
    starts=("causal_init",) if adapters else ("causal_init", "teacher"),
    rules=(adapters or e.stored_student).sharding_rules,
    feeds=feeds,
    # The generator first, every `critic_updates` steps; the critic in every step, on rollouts of
    # the student as it then is. Each takes a fresh batch of prompts.
    updates=(
      Update(
        generator,
        tuple(feeds),
        reads=("real_score", *base),
        frozen=lambda negative, score, *base: distill.Frozen(score, negative, *base),
        name="generator",
        due=config.updates_generator,
      ),
      Update(
        critic,
        ("prompts",),
        reads=(base or ("real_score",)) if adapters else (),
        frozen=(lambda negative, base: distill.Frozen(None, None, base)) if adapters else None,
        name="critic",
      ),
    ),
  )


def of_framepack(run: Run) -> Stage:
  """Returns the training of a packed model: of all weights, or of adapters."""
  e, config, network = run.experiment, run.experiment.framepack, run.experiment.packed_dit
  key, adapters = stage_key(e, "framepack"), run.experiment.packed_adapters
  optimizer = config.optimizer(adapters or network)
  make_step = functools.partial(
    framepack.make_step,
    config,
    network,
    optimizer,
    e.latent.frames,
    codebook=run.codebook,
    adapters=adapters,
  )

  def create(weights: Params) -> TrainState:
    params = network.with_projections(weights)
    # 0: for A; a step splits what it draws from fold_in(key, step) again
    params = adapters.start(jax.random.fold_in(key, 0), params) if adapters else params
    return create_state(key, params, optimizer)

  def frozen(negative, *weights: Params) -> framepack.Frozen:
    bases = (adapters.frozen(network.with_projections(base)) for base in weights)
    return framepack.Frozen(negative, *bases)

  stored = ("latents",) if e.stores_latents else ("video",)
  return Stage(
    "framepack",
    config,
    create=create,
    starts=("teacher",),
    rules=(adapters or network).sharding_rules,
    feeds={"clips": Feed("data", stored, salt=7)},
    updates=(Update(make_step, ("clips",), reads=("teacher",) if adapters else (), frozen=frozen),),
  )
