"""Distillation's two updates over arrays: no text encoder, no file.

    make_step(config, networks, method, optimizer, mean) -> step(state, batch, frozen)

batch: {text [b l d], example_id [b]}, encoded before it comes here; frozen: what is trained by
nobody. An objective is a list of (weight, name) of terms; term i draws from fold_in(key, 1 + i).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiar_jax.losses import critic as critic_loss
from hiar_jax.losses import dmd as dmd_loss
from hiar_jax.losses import forward_kl as fkl_loss
from hiar_jax.losses.flow_matching import sample_sigma
from hiar_jax.method import Method
from hiar_jax.models.frames import Bound, Network, bind
from hiar_jax.rollout.exit_step import self_rollout
from hiar_jax.rollout.noise import block_noise, example_keys, example_normal
from hiar_jax.training.state import apply_gradients, update_ema
from hiar_jax.types import LatentShape, Params


class Networks(NamedTuple):
  """The three networks of distillation."""

  student: Network
  critic: Network
  teacher: Network


class Frozen(NamedTuple):
  """teacher: parameters of the real score; negative: text [1 l d] for its guidance."""

  teacher: Params
  negative: jax.Array


class Scores(NamedTuple):
  """What a term may ask of the networks, bound to the batch."""

  student: Bound
  critic: Bound
  real: Bound
  negative: Bound


def rollout(bound: Bound, batch, key, method: Method, shape: LatentShape):
  """Returns x0 [b f h w c] of a self-rollout to a random exit level, the same for all examples."""
  k_exit, k_noise = jax.random.split(key)
  exit_level = jax.random.randint(k_exit, (), 0, method.levels)
  noise = block_noise(k_noise, batch["example_id"], shape.block(method.block))
  return self_rollout(bound, noise, method, shape, exit_level)


def score_draws(config, key, batch, shape):
  keys = jax.vmap(jax.random.split)(example_keys(key, batch["example_id"]))
  sigma = sample_sigma(keys[:, 0], config.score_shift, config.score_low, config.score_high)
  return sigma, example_normal(keys[:, 1], shape)


def distribution_matching(config, method: Method):
  def term(scores: Scores, x, batch, key):
    sigma, eps = score_draws(config, key, batch, x.shape[1:])
    compared = dmd_loss.Scores(scores.critic, scores.real, scores.negative)
    gradient = jax.lax.stop_gradient(
      dmd_loss.dmd_gradient(compared, jax.lax.stop_gradient(x), eps, sigma, config.guidance)
    )
    return dmd_loss.dmd(x, gradient), {}

  return term


def forward_kl(config, method: Method):
  def term(scores: Scores, x, batch, key):
    level = jax.random.randint(key, (), 0, config.forward_kl.steps)
    clips = batch["trajectories"]
    student = scores.student.with_texts(clips["text"][None])
    sigmas = jnp.asarray(method.sigmas, jnp.float32)
    return fkl_loss.forward_kl(student, clips["trajectory"], level, sigmas, method), {}

  return term


TERMS = {"dmd": distribution_matching, "forward_kl": forward_kl}


def make_generator_step(
  config, networks: Networks, method, shape, optimizer, objective, mean=lambda tree: tree
):
  terms = [(weight, name, TERMS[name](config, method)) for weight, name in objective]

  def step(state, batch, frozen: Frozen) -> tuple[Any, dict]:
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)

    def loss(params, part):
      text = part["text"]
      negative = jnp.broadcast_to(frozen.negative, text.shape)
      scores = Scores(
        bind(networks.student, params, text),
        bind(networks.critic, state.critic, text),
        bind(networks.teacher, frozen.teacher, text),
        bind(networks.teacher, frozen.teacher, negative),
      )
      x = rollout(scores.student, part, jax.random.fold_in(key, 0), method, shape)
      total, metrics = 0.0, {}
      for i, (weight, name, term) in enumerate(terms):
        values, more = term(scores, x, part, jax.random.fold_in(key, 1 + i))
        total = total + weight * values.mean()
        metrics |= {name: values.mean(), **more}
      return total, metrics

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    updates = (state.step - config.critic_warmup) // config.critic_updates
    ema = update_ema(state.ema, params, updates, config)
    return state.replace(params=params, ema=ema, opt_state=opt_state), metrics

  return step


def make_critic_step(config, networks: Networks, method, shape, optimizer, mean=lambda tree: tree):
  def step(state, batch, frozen: Frozen) -> tuple[Any, dict]:
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)

    def loss(critic, part):
      student = bind(networks.student, state.params, part["text"])
      x = rollout(student, part, jax.random.fold_in(key, 0), method, shape)
      sigma, eps = score_draws(config, jax.random.fold_in(key, 1), part, x.shape[1:])
      bound = bind(networks.critic, critic, part["text"])
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
