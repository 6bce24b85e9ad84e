"""Distillation: the student rolls itself out; the critic follows its distribution, the generator is
moved towards the teacher's.

HiAR: L = L_DMD + lambda L_FKL (Eq. 11), critic : generator updates 5 : 1, exit level uniform over
the student's levels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.components.interfaces import Task
from hiar_jax.errors import UserError, at_least
from hiar_jax.losses import critic as critic_loss
from hiar_jax.losses import dmd as dmd_loss
from hiar_jax.losses import forward_kl as fkl_loss
from hiar_jax.losses.flow_matching import sample_sigma
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.rollout.exit_step import self_rollout, self_rollout_without_gradient
from hiar_jax.rollout.noise import block_noise, example_keys, example_normal
from hiar_jax.rollout.past import ring as caches
from hiar_jax.training.state import TrainConfig, TrainState, apply_gradients, update_ema
from hiar_jax.types import Batch, Key, Mean, Params


@dataclasses.dataclass(frozen=True)
class ForwardKLConfig:
  """weight: lambda; steps: K, how many first levels it holds; attention, target: see
  losses.forward_kl.
  """

  weight: float = 0.1
  steps: int = 1
  attention: str = "bidirectional"
  target: str = "velocity"

  def __post_init__(self):
    at_least(0, weight=self.weight)
    at_least(1, steps=self.steps)
    for name, allowed in (("attention", fkl_loss.ATTENTIONS), ("target", fkl_loss.TARGETS)):
      if getattr(self, name) not in allowed:
        raise UserError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
  """`steps` counts critic updates, as the published code does; the generator takes one every
  `critic_updates`.

  critic_lr: of the critic. critic_warmup: critic updates before the generator's first.
  guidance: g of losses.dmd; score_shift, score_low, score_high: the levels at which scores are
  compared and the critic trained.
  """

  critic_lr: float
  critic_updates: int = 5
  critic_warmup: int = 0
  guidance: float = 3.0
  score_shift: float = 5.0
  score_low: float = 0.02
  score_high: float = 0.98
  forward_kl: ForwardKLConfig = ForwardKLConfig()

  def __post_init__(self):
    super().__post_init__()
    at_least(1, critic_updates=self.critic_updates)
    at_least(0, critic_lr=self.critic_lr, critic_warmup=self.critic_warmup)

  def updates_generator(self, step: int) -> bool:
    """Whether the generator moves before critic update `step`."""
    return step >= self.critic_warmup and (step - self.critic_warmup) % self.critic_updates == 0

  @property
  def generator_steps(self) -> int:
    return -(-max(self.steps - self.critic_warmup, 0) // self.critic_updates)

  def generator_optimizer(self):
    return self.optimizer(steps=max(self.generator_steps, 1))

  def critic_optimizer(self):
    return self.optimizer(self.critic_lr)


@dataclasses.dataclass(frozen=True)
class Student:
  """The networks' sizes and the method: everything that a self-rollout needs but the weights.

  point_sigmas: levels of the trajectories, where they are not the student's.
  """

  model: dit.DiTConfig
  critic_model: dit.DiTConfig
  teacher_model: dit.DiTConfig
  method: Method
  sigmas: jax.Array  # [s+1], float32
  task: Task
  point_sigmas: jax.Array | None = None

  def generate(self, params: Params, frozen: Params, clips: Batch, key: Key) -> jax.Array:
    """Self-rollout to a random exit level, the same for all examples: x0 [b f h w c],
    differentiable in params.
    """
    return self_rollout(self.bind(self.model, params, clips), *self._rollout(frozen, clips, key))

  def sample(self, frozen: Params, clips: Batch, key: Key) -> jax.Array:
    """The same clips, without gradient."""
    return self_rollout_without_gradient(*self._rollout(frozen, clips, key))

  def bind(self, model: dit.DiTConfig, params: Params, clips: Batch):
    """A network on the texts and starts of clips {tokens, start where places are embedded}."""
    return dit.bind(model, params, self.task.embed(clips["tokens"]), clips.get("start"))

  def _rollout(self, frozen: Params, clips: Batch, key: Key) -> tuple:
    k_exit, k_noise = jax.random.split(key)
    exit_level = jax.random.randint(k_exit, (), 0, self.sigmas.size - 1)
    latent = self.task.latent
    return (
      self.bind(self.model, frozen, clips),
      block_noise(k_noise, clips["example_id"], latent.block(self.method.block)),
      caches.empty(
        self.model,
        self.method,
        batch=clips["tokens"].shape[0],
        frames=latent.frames,
        height=latent.height,
        width=latent.width,
      ),
      self.sigmas,
      self.method,
      latent.frames // self.method.block,
      exit_level,
    )


def _score_draws(
  config: DistillConfig, key: Key, index: jax.Array, shape
) -> tuple[jax.Array, jax.Array]:
  """(sigma [b], eps [b f h w c]) at which scores are taken."""
  keys = jax.vmap(jax.random.split)(example_keys(key, index))
  sigma = sample_sigma(keys[:, 0], config.score_shift, config.score_low, config.score_high)
  return sigma, example_normal(keys[:, 1], shape)


def make_critic_step(config: DistillConfig, student: Student):
  """step(state, batch {tokens, example_id, start where places are embedded}, mean) -> (state,
  metrics).

  Advances state.step.
  """
  optimizer = config.critic_optimizer()

  def step(state: TrainState, batch: Batch, mean: Mean) -> tuple[TrainState, dict]:
    k_rollout, k_score = jax.random.split(
      jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
    )

    def loss(critic, part):
      x = student.sample(state.params, part, k_rollout)
      sigma, eps = _score_draws(config, k_score, part["example_id"], x.shape[1:])
      forward = student.bind(student.critic_model, critic, part)
      return critic_loss.critic(forward, x, eps, sigma).mean(), {}

    critic, opt_state, metrics = apply_gradients(
      loss,
      state.critic,
      state.critic_opt_state,
      optimizer,
      batch,
      accumulate=config.accumulate,
      mean=mean,
    )
    return state.replace(step=state.step + 1, critic=critic, critic_opt_state=opt_state), metrics

  return step


def make_generator_step(config: DistillConfig, student: Student):
  """step(state, batch, teacher, mean) -> (state, metrics). Leaves state.step alone; EMA counts
  generator updates.

  batch {tokens, example_id, start where places are embedded}, and with forward-KL trajectories
  {trajectory [b s+1 f h w c], tokens, start}.
  teacher: frozen params.
  """
  fkl, optimizer = config.forward_kl, config.generator_optimizer()

  def step(state: TrainState, batch: Batch, teacher: Params, mean: Mean) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
    k_rollout, k_score, k_fkl = jax.random.split(key, 3)

    def loss(params, part):
      x = student.generate(params, state.params, part, k_rollout)
      gradient = _dmd_gradient(
        config, student, state.critic, teacher, jax.lax.stop_gradient(x), part, k_score
      )
      dmd = dmd_loss.dmd(x, gradient).mean()
      metrics = {
        "dmd": dmd,
        "dmd_gradient": jnp.sqrt(jnp.mean(gradient**2, axis=range(1, x.ndim))).mean(),
      }
      if not fkl.weight:
        return dmd, metrics
      held, level = part["trajectories"], jax.random.randint(k_fkl, (), 0, fkl.steps)
      kept = fkl_loss.forward_kl(
        student.bind(student.model, params, held),
        held["trajectory"].astype(jnp.float32),
        level,
        student.sigmas,
        student.method,
        attention=fkl.attention,
        target=fkl.target,
        point_sigmas=student.point_sigmas,
      ).mean()
      return dmd + fkl.weight * kept, {**metrics, "forward_kl": kept}

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    updates = (state.step - config.critic_warmup) // config.critic_updates
    averaged = update_ema(state.ema, params, updates, config)
    return state.replace(params=params, ema=averaged, opt_state=opt_state), metrics

  return step


def _dmd_gradient(config, student, critic, teacher, x, part, key):
  """The score difference at x [b f h w c]; neither score receives gradient."""
  text = student.task.embed(part["tokens"])
  sigma, eps = _score_draws(config, key, part["example_id"], x.shape[1:])
  real = lambda text: dit.bind(student.teacher_model, teacher, text, part.get("start"))
  fake = student.bind(student.critic_model, critic, part)
  negative = student.task.negative(text)
  return jax.lax.stop_gradient(
    dmd_loss.dmd_gradient(fake, real(text), real(negative), x, eps, sigma, config.guidance)
  )
