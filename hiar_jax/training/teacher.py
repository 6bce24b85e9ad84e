"""The teacher: bidirectional flow matching with caption dropout, for classifier-free guidance."""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.losses.flow_matching import flow_matching, sample_sigma
from hiar_jax.models.frames import Network, bind
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.training.state import (
  TrainConfig,
  TrainState,
  apply_gradients,
  identity,
  update_ema,
)
from hiar_jax.types import Batch, Mean, Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(TrainConfig):
  """The teacher's training.

  shift: of the training levels (flow, Eq. 3); caption_dropout: share of examples that are trained
  on the empty prompt.
  """

  shift: float = 5.0
  caption_dropout: float = 0.1


def make_step(config: TeacherConfig, network: Network, optimizer, *, mean: Mean = identity):
  """Returns step(state, batch, negative) -> (state, metrics).

  batch: {latents, text, example_id}, and start where the model embeds places. negative: text
  [1 l d], which takes the place of a dropped caption. mean: averages over devices.
  """

  def step(state: TrainState, batch: Batch, negative: Text) -> tuple[TrainState, dict]:
    # The state's key never changes: a step's draws depend on its number alone, so a resumed run
    # repeats them.
    key = jax.random.fold_in(state.key, state.step)

    def loss(params, part):
      # [b 3]: caption dropout, sigma, noise
      keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, part["example_id"]))
      dropped = jax.vmap(jax.random.uniform)(keys[:, 0]) < config.caption_dropout
      text = jnp.where(dropped[:, None, None], negative, part["text"])
      x0 = part["latents"]
      sigma = sample_sigma(keys[:, 1], config.shift)
      eps = example_normal(keys[:, 2], x0.shape[1:])
      bound = bind(network, params, text, part.get("start"))
      return flow_matching(bound, x0, eps, sigma).mean(), {}

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    ema = update_ema(state.ema, params, state.step, config)
    state = state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
    return state, metrics

  return step
