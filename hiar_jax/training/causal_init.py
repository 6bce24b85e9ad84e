"""Causal init: the block-causal student regresses the ends of the teacher's trajectories from their
points at its own levels (the ODE initialisation of CausVid and Self-Forcing).
"""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.errors import one_of
from hiar_jax.losses import trajectory as losses
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Network, bind
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.training.state import TrainConfig, TrainState, averaged_update, identity
from hiar_jax.types import Batch, Mean

SHOWS = ("noisy", "history")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalInitConfig(TrainConfig):
  """The student's training before distillation.

  shows: the context of a block: `noisy`, the other blocks each at its own random level (published),
  or `history`, the earlier blocks at the level at which `method` generates.
  """

  shows: str = "noisy"

  def __post_init__(self):
    super().__post_init__()
    one_of(SHOWS, shows=self.shows)


def make_step(
  config: CausalInitConfig,
  network: Network,
  method: MethodConfig,
  sigmas,
  optimizer,
  *,
  mean: Mean = identity,
):
  """Returns step(state, batch, frozen) -> (state, metrics); frozen is not read.

  batch: {trajectory [b s+1 f h w c], text, example_id}, and start where the model embeds places.
  sigmas [s+1]: the levels of the trajectories' points. mean: averages over devices.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  count = sigmas.size - 1  # the last point, at sigma 0, is the target, not a noisy input

  def step(state: TrainState, batch: Batch, frozen=None) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(state.key, state.step)

    def loss(params, part):
      keys = example_keys(key, part["example_id"])
      bound = bind(network, params, part["text"], part.get("start"))
      # stored as float16 perhaps; differences between points near sigma 1 need float32
      points = part["trajectory"].astype(jnp.float32)
      # In the published form every block has its own level. With a history all blocks of a clip
      # share one, as they do in a sweep of the rollout.
      shared = config.shows == "history"
      levels = losses.sample_levels(keys, count, points.shape[2], method.block, shared)
      if not shared:
        return losses.trajectory(bound, points, levels, sigmas, method).mean(), {}

      def eps():
        # 1: `levels` are drawn from the keys themselves
        return example_normal(jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), points.shape[2:])

      loss = losses.trajectory_with_history(bound, points, levels, sigmas, method, eps)
      return loss.mean(), {}

    return averaged_update(config, state, loss, optimizer, batch, mean=mean)

  return step
