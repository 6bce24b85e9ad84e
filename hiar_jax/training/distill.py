"""Distillation by distribution matching on the student's own rollouts.

The critic (fake score) follows the student's distribution; the generator (the student) moves
towards the teacher's (real score). HiAR: L = L_DMD + lambda L_FKL (Eq. 11), critic : generator
updates 5 : 1 (section 4.1), exit level uniform over the student's levels.
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
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.frames import Bound, bind
from hiar_jax.rollout.exit_step import self_rollout, self_rollout_without_gradient
from hiar_jax.rollout.noise import block_noise, example_keys, example_normal
from hiar_jax.training.state import TrainConfig, TrainState, apply_gradients, update_ema
from hiar_jax.types import Batch, Key, Mean, Params


@dataclasses.dataclass(frozen=True)
class ForwardKLConfig:
  """The forward-KL term: weight (lambda of Eq. 11), steps (K, the first levels that it covers), and
  attention and target as in losses.forward_kl.
  """

  weight: float = 0.1  # both: HiAR, section 4.1
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
  """The training of generator and critic; the inherited fields are the generator's.

  steps: critic updates, as the published code counts. critic_updates: critic updates for each of
  the generator's; critic_warmup: those before the generator's first. guidance: g of losses.dmd.
  score_shift, score_low, score_high: shift and range of the sigmas at which the scores are compared
  and the critic is trained.
  """

  critic_lr: float
  critic_updates: int = 5  # HiAR, section 4.1
  critic_warmup: int = 0
  guidance: float = 3.0  # this and the next three: HiAR's published config
  score_shift: float = 5.0
  score_low: float = 0.02
  score_high: float = 0.98
  forward_kl: ForwardKLConfig = ForwardKLConfig()

  def __post_init__(self):
    super().__post_init__()
    at_least(1, critic_updates=self.critic_updates)
    at_least(0, critic_lr=self.critic_lr, critic_warmup=self.critic_warmup)

  def updates_generator(self, step: int) -> bool:
    """Returns True where a generator update comes before critic update `step`."""
    return step >= self.critic_warmup and (step - self.critic_warmup) % self.critic_updates == 0

  @property
  def generator_steps(self) -> int:
    """The generator updates of the whole stage."""
    return -(-max(self.steps - self.critic_warmup, 0) // self.critic_updates)

  def generator_optimizer(self):
    """Returns the generator's optimizer, whose schedule counts generator updates."""
    return self.optimizer(steps=max(self.generator_steps, 1))

  def critic_optimizer(self):
    return self.optimizer(self.critic_lr)


@dataclasses.dataclass(frozen=True)
class Student:
  """The three networks' sizes and the method: all of a self-rollout but the weights.

  point_sigmas: [s+1], levels of the trajectories' points where they are not the student's.
  """

  model: DiTConfig
  critic_model: DiTConfig
  teacher_model: DiTConfig
  method: Method
  task: Task
  point_sigmas: jax.Array | None = None

  def generate(self, params: Params, clips: Batch, key: Key) -> jax.Array:
    """Returns x0 [b f h w c] of a self-rollout to a random exit level, the same for all examples.

    Differentiable in params, through the exit step alone.
    """
    return self_rollout(*self._rollout(params, clips, key))

  def sample(self, params: Params, clips: Batch, key: Key) -> jax.Array:
    """Returns the clips that `generate` returns for these arguments, without gradient."""
    return self_rollout_without_gradient(*self._rollout(params, clips, key))

  def bind(self, model: DiTConfig, params: Params, clips: Batch) -> Bound:
    """Returns a network bound to the texts (and starts, if any) of clips."""
    return bind(model, params, self.task.embed(clips["tokens"]), clips.get("start"))

  def _rollout(self, params: Params, clips: Batch, key: Key) -> tuple:
    """Returns the arguments of self_rollout."""
    latent = self.task.latent
    k_exit, k_noise = jax.random.split(key)
    # one level for the batch: it is a traced loop count, on which all examples must agree
    exit_level = jax.random.randint(k_exit, (), 0, self.method.levels)
    noise = block_noise(k_noise, clips["example_id"], latent.block(self.method.block))
    return self.bind(self.model, params, clips), noise, self.method, latent, exit_level


def _score_draws(
  config: DistillConfig, key: Key, index: jax.Array, shape
) -> tuple[jax.Array, jax.Array]:
  """Draws the level sigma [b] and the noise eps [b *shape] at which a score is evaluated.

  index: example_id [b]; shape: [f h w c].
  """
  keys = jax.vmap(jax.random.split)(example_keys(key, index))
  sigma = sample_sigma(keys[:, 0], config.score_shift, config.score_low, config.score_high)
  return sigma, example_normal(keys[:, 1], shape)


def make_critic_step(config: DistillConfig, student: Student):
  """Returns step(state, batch, mean) -> (state, metrics), which advances state.step.

  batch: {tokens, example_id}, and start where the model embeds places.
  """
  optimizer = config.critic_optimizer()

  def step(state: TrainState, batch: Batch, mean: Mean) -> tuple[TrainState, dict]:
    # 0: the critic's draws of this step; 1 are the generator's
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
    k_rollout, k_score = jax.random.split(key)

    def loss(critic, part):
      x = student.sample(state.params, part, k_rollout)
      sigma, eps = _score_draws(config, k_score, part["example_id"], x.shape[1:])
      bound = student.bind(student.critic_model, critic, part)
      return critic_loss.critic(bound, x, eps, sigma).mean(), {}

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
  """Returns step(state, batch, teacher, mean) -> (state, metrics), which leaves state.step alone.

  batch: {tokens, example_id}, start where the model embeds places, and for forward KL trajectories:
  {trajectory [b s+1 f h w c], tokens, start}. teacher: params of the real score.
  """
  fkl = config.forward_kl
  optimizer = config.generator_optimizer()

  def step(state: TrainState, batch: Batch, teacher: Params, mean: Mean) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
    k_rollout, k_score, k_fkl = jax.random.split(key, 3)

    def loss(params, part):
      x = student.generate(params, part, k_rollout)
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
      clips = part["trajectories"]
      level = jax.random.randint(k_fkl, (), 0, fkl.steps)  # one of the first K
      forward_kl = fkl_loss.forward_kl(
        student.bind(student.model, params, clips),
        clips["trajectory"].astype(jnp.float32),
        level,
        jnp.asarray(student.method.sigma_table),
        student.method,
        attention=fkl.attention,
        target=fkl.target,
        point_sigmas=student.point_sigmas,
      ).mean()
      return dmd + fkl.weight * forward_kl, {**metrics, "forward_kl": forward_kl}

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    # state.step counts critic updates; the average counts the generator's own
    updates = (state.step - config.critic_warmup) // config.critic_updates
    ema = update_ema(state.ema, params, updates, config)
    return state.replace(params=params, ema=ema, opt_state=opt_state), metrics

  return step


def _dmd_gradient(config, student, critic, teacher, x, part, key):
  """Returns losses.dmd.dmd_gradient at x [b f h w c]; no gradient reaches critic or teacher."""
  text = student.task.embed(part["tokens"])
  sigma, eps = _score_draws(config, key, part["example_id"], x.shape[1:])
  negative, start = student.task.negative(text), part.get("start")
  scores = dmd_loss.Scores(
    fake=student.bind(student.critic_model, critic, part),
    # the teacher runs twice, with the prompt and with the negative text, for guidance
    real=bind(student.teacher_model, teacher, text, start),
    negative=bind(student.teacher_model, teacher, negative, start),
  )
  return jax.lax.stop_gradient(dmd_loss.dmd_gradient(scores, x, eps, sigma, config.guidance))
