"""Causal init: the block-causal student regresses the ends of the teacher's trajectories from their
points at its own levels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.components.interfaces import Task
from hiar_jax.errors import UserError
from hiar_jax.losses import trajectory as losses
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.rollout.noise import example_keys
from hiar_jax.training.state import TrainConfig, TrainState, apply_gradients, update_ema
from hiar_jax.types import Batch, Mean

SHOWS = ("noisy", "history")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalInitConfig(TrainConfig):
  """shows: what a block sees of the others: `noisy`, each block at a level of its own (published),
  or as `method` will show them.
  """

  shows: str = "noisy"

  def __post_init__(self):
    super().__post_init__()
    if self.shows not in SHOWS:
      raise UserError(f"shows = {self.shows!r}: expected one of {', '.join(SHOWS)}")


def make_step(config: CausalInitConfig, model, task: Task, sigmas, method: Method):
  """step(state, batch {trajectory, tokens, example_id, start where places are embedded}, mean) ->
  (state, metrics).

  sigmas [s+1]: the student's levels.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  count = sigmas.size - 1
  optimizer = config.optimizer()

  def step(state: TrainState, batch: Batch, mean: Mean) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(state.key, state.step)

    def loss(params, part):
      keys = example_keys(key, part["example_id"])
      forward = dit.bind(model, params, task.embed(part["tokens"]), part.get("start"))
      points = part["trajectory"].astype(jnp.float32)
      shared = config.shows == "history"
      levels = losses.sample_levels(keys, count, task.latent.frames, method.block, shared)
      regress = losses.trajectory_with_history if shared else losses.trajectory
      return regress(forward, points, levels, sigmas, method).mean(), {}

    params, opt_state, metrics = apply_gradients(
      loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
    )
    averaged = update_ema(state.ema, params, state.step, config)
    return state.replace(
      step=state.step + 1, params=params, ema=averaged, opt_state=opt_state
    ), metrics

  return step
