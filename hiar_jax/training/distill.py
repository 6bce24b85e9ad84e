"""Distillation by distribution matching on the student's own rollouts.

The critic (fake score) follows the student's distribution; the generator (the student) moves
towards the teacher's (real score). HiAR: L = L_DMD + lambda L_FKL (Eq. 11), critic : generator
updates 5 : 1 (section 4.1), exit level uniform over the student's levels.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError, above, at_least, finite, one_of, within
from hiar_jax.losses import critic as critic_loss
from hiar_jax.losses import dmd as dmd_loss
from hiar_jax.losses import forward_kl as fkl_loss
from hiar_jax.losses.flow_matching import sample_sigma
from hiar_jax.method import Method
from hiar_jax.models.frames import Bound, Network, bind
from hiar_jax.rollout.exit_step import self_rollout, self_rollout_without_gradient
from hiar_jax.rollout.noise import block_noise, example_keys, example_normal
from hiar_jax.training.lora import Adapters, LoRAConfig
from hiar_jax.training.state import (
  TrainConfig,
  TrainState,
  apply_gradients,
  identity,
  update_ema,
)
from hiar_jax.types import Batch, Key, LatentShape, Mean, Params, Text, Video


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
    one_of(fkl_loss.ATTENTIONS, attention=self.attention)
    one_of(fkl_loss.TARGETS, target=self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
  """The training of generator and critic; the inherited fields are the generator's.

  steps: critic updates, as the published code counts. critic_updates: critic updates for each of
  the generator's; critic_warmup: those before the generator's first. guidance: g of losses.dmd.
  score_shift, score_low, score_high: shift and range of the sigmas at which the scores are compared
  and the critic is trained. critic_lora: adapters that the critic trains beside the weights that it
  starts from; by default all of its weights are trained, as published.
  """

  critic_lr: float
  critic_updates: int = 5  # HiAR, section 4.1
  critic_warmup: int = 0
  guidance: float = 3.0  # this and the next three: HiAR's published config
  score_shift: float = 5.0
  score_low: float = 0.02
  score_high: float = 0.98
  forward_kl: ForwardKLConfig = ForwardKLConfig()
  critic_lora: LoRAConfig = dataclasses.field(default=LoRAConfig(), metadata={"since": "2026-11"})

  def __post_init__(self):
    super().__post_init__()
    at_least(1, critic_updates=self.critic_updates)
    at_least(0, critic_warmup=self.critic_warmup)
    above(0, critic_lr=self.critic_lr, score_shift=self.score_shift)
    finite(guidance=self.guidance)
    within(0, 1, score_low=self.score_low, score_high=self.score_high)
    if self.score_low > self.score_high:
      raise UserError(
        f"score_low = {self.score_low}, score_high = {self.score_high}: expected a range, low first"
      )

  def updates_generator(self, step: int) -> bool:
    """Returns True where a generator update comes before critic update `step`."""
    return step >= self.critic_warmup and (step - self.critic_warmup) % self.critic_updates == 0

  @property
  def generator_steps(self) -> int:
    """The generator updates of the whole stage."""
    return -(-max(self.steps - self.critic_warmup, 0) // self.critic_updates)

  @property
  def averaged(self) -> int:
    return self.generator_steps

  def generator_optimizer(self, network: Network):
    """Returns the generator's optimizer, whose schedule counts generator updates."""
    return self.optimizer(network, steps=max(self.generator_steps, 1))

  def critic_optimizer(self, network: Network | Adapters):
    return self.optimizer(network, lr=self.critic_lr)


class Frozen(NamedTuple):
  """What a step reads and nobody trains; None where it does not.

  real_score: the teacher's parameters. negative: text [1 l d] of the negative prompt. critic: the
  parameters beside the critic's adapters; None: the real score's.
  """

  real_score: Params | None
  negative: Text | None
  critic: Params | None = None


class Networks(NamedTuple):
  """The three networks of distillation; the critic and the teacher may have other sizes.

  adapters: those that the state's critic is; None: the network's own parameters.
  """

  student: Network
  critic: Network
  teacher: Network
  adapters: Adapters | None = None

  def whole_critic(self, trained: Params, frozen: Frozen | None) -> Params:
    """Returns the critic's parameters, of what the state has of them."""
    if self.adapters is None:
      return trained
    return self.adapters.merged(
      trained, frozen.real_score if frozen.critic is None else frozen.critic
    )


def _bind(network: Network, params: Params, clips: Batch, text: Text | None = None) -> Bound:
  return bind(network, params, clips["text"] if text is None else text, clips.get("start"))


def _rollout(bound: Bound, batch: Batch, method: Method, shape: LatentShape, key: Key) -> tuple:
  """Returns the arguments of a self-rollout to a random exit level, the same for all examples."""
  k_exit, k_noise = jax.random.split(key)
  # one level for the batch: it is a traced loop count, on which all examples must agree
  exit_level = jax.random.randint(k_exit, (), 0, method.levels)
  noise = block_noise(k_noise, batch["example_id"], shape.block(method.block))
  return bound, noise, method, shape, exit_level


def _score_draws(
  config: DistillConfig, key: Key, index: jax.Array, shape
) -> tuple[jax.Array, jax.Array]:
  """Draws the level sigma [b] and the noise eps [b *shape] at which a score is evaluated.

  index: example_id [b]; shape: [f h w c].
  """
  keys = jax.vmap(jax.random.split)(example_keys(key, index))
  sigma = sample_sigma(keys[:, 0], config.score_shift, config.score_low, config.score_high)
  return sigma, example_normal(keys[:, 1], shape)


# ------------------------------------------------------------------------------------ the objective


class Bounds(NamedTuple):
  """What a term may ask: the networks, bound to the batch's texts; negative: the teacher, bound to
  the negative one. The student's parameters are those that are differentiated.
  """

  student: Bound
  critic: Bound
  teacher: Bound
  negative: Bound


# term(nets, x, batch, key) -> (loss [b], metrics); x: the self-rollout's x0 [b f h w c]
Term = Callable[[Bounds, Video, Batch, Key], tuple[jax.Array, dict[str, jax.Array]]]


def distribution_matching(config: DistillConfig, method: Method, point_sigmas) -> Term:
  """Returns the term of losses.dmd."""

  def term(nets: Bounds, x: Video, batch: Batch, key: Key):
    at = jax.lax.stop_gradient(x)
    sigma, eps = _score_draws(config, key, batch["example_id"], x.shape[1:])
    # the teacher runs twice, with the prompt and with the negative text, for guidance
    scores = dmd_loss.Scores(nets.critic, nets.teacher, nets.negative)
    # no gradient reaches critic or teacher
    gradient = jax.lax.stop_gradient(dmd_loss.dmd_gradient(scores, at, eps, sigma, config.guidance))
    gradient, lost = dmd_loss.finite(gradient)
    size = jnp.sqrt(jnp.mean(gradient**2, axis=range(1, x.ndim))).mean()
    return dmd_loss.dmd(x, gradient), {"dmd_gradient": size, "dmd_not_finite": lost}

  return term


def forward_kl(config: DistillConfig, method: Method, point_sigmas) -> Term:
  """Returns the term of losses.forward_kl, on the batch's `trajectories`."""
  fkl = config.forward_kl

  def term(nets: Bounds, x: Video, batch: Batch, key: Key):
    clips = batch["trajectories"]
    level = jax.random.randint(key, (), 0, fkl.steps)  # one of the first K
    student = nets.student
    loss = fkl_loss.forward_kl(
      _bind(student.network, student.params, clips),
      clips["trajectory"].astype(jnp.float32),
      level,
      jnp.asarray(method.sigma_table),
      method,
      attention=fkl.attention,
      target=fkl.target,
      point_sigmas=point_sigmas,
    )
    return loss, {}

  return term


# name in an objective -> (config, method, point_sigmas) -> term; point_sigmas [s+1]: the levels of
# the trajectories' points where they are not the student's, else None
TERMS: dict[str, Callable[[DistillConfig, Method, jax.Array | None], Term]] = {
  "dmd": distribution_matching,
  "forward_kl": forward_kl,
}


def objective(config: DistillConfig) -> list[tuple[float, str]]:
  """Returns the generator's objective, weights and names of TERMS: HiAR, Eq. 11."""
  terms = [(1.0, "dmd"), (config.forward_kl.weight, "forward_kl")]
  return [(weight, name) for weight, name in terms if weight]


# ---------------------------------------------------------------------------------------- the steps


def make_critic_step(
  config: DistillConfig,
  networks: Networks,
  method: Method,
  shape: LatentShape,
  optimizer,
  *,
  mean: Mean = identity,
):
  """Returns step(state, batch, frozen) -> (state, metrics), which advances state.step.

  batch: {text, example_id}, and start where the model embeds places. frozen: Frozen, read where the
  critic has adapters. shape: of the clips that the student generates. mean: averages over devices.
  """

  def step(state: TrainState, batch: Batch, frozen: Frozen | None = None):
    # 0: the critic's draws of this step; 1 are the generator's
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
    k_rollout, k_score = jax.random.split(key)

    def loss(critic, part):
      student = _bind(networks.student, state.params, part)
      x = self_rollout_without_gradient(*_rollout(student, part, method, shape, k_rollout))
      sigma, eps = _score_draws(config, k_score, part["example_id"], x.shape[1:])
      score = _bind(networks.critic, networks.whole_critic(critic, frozen), part)
      return critic_loss.critic(score, x, eps, sigma).mean(), {}

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


def make_generator_step(
  config: DistillConfig,
  networks: Networks,
  method: Method,
  shape: LatentShape,
  optimizer,
  *,
  point_sigmas: jax.Array | None = None,
  mean: Mean = identity,
):
  """Returns step(state, batch, frozen) -> (state, metrics), which leaves state.step alone.

  batch: {text, example_id}, start where the model embeds places, and for forward KL trajectories:
  {trajectory [b s+1 f h w c], text, start}. frozen: Frozen. point_sigmas: see TERMS. The rest: as
  make_critic_step.
  """
  terms = [
    (weight, name, TERMS[name](config, method, point_sigmas)) for weight, name in objective(config)
  ]

  def step(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
    critic = networks.whole_critic(state.critic, frozen)

    def loss(params, part):
      negative = jnp.broadcast_to(frozen.negative, part["text"].shape)
      nets = Bounds(
        student=_bind(networks.student, params, part),
        critic=_bind(networks.critic, critic, part),
        teacher=_bind(networks.teacher, frozen.real_score, part),
        negative=_bind(networks.teacher, frozen.real_score, part, negative),
      )
      # fold_in(key, i) is split(key, n)[i]: a term more leaves the draws of the others as they are
      k_rollout = jax.random.fold_in(key, 0)
      x = self_rollout(*_rollout(nets.student, part, method, shape, k_rollout))
      total, metrics = 0.0, {}
      for i, (weight, name, term) in enumerate(terms):
        values, more = term(nets, x, part, jax.random.fold_in(key, 1 + i))
        total = total + weight * values.mean()
        metrics |= {name: values.mean(), **more}
      return total, metrics

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    # state.step counts critic updates; the average counts the generator's own
    updates = (state.step - config.critic_warmup) // config.critic_updates
    ema = update_ema(state.ema, params, updates, config)
    return state.replace(params=params, ema=ema, opt_state=opt_state), metrics

  return step
