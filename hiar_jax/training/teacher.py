"""The teacher: bidirectional flow matching with caption dropout, for classifier-free guidance."""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax.errors import above, within
from hiar_jax.flow import shift_sigma
from hiar_jax.losses.flow_matching import flow_matching, sample_sigma
from hiar_jax.models.frames import Network, bind
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.training.state import TrainConfig, TrainState, averaged_update, identity
from hiar_jax.types import Batch, Key, Mean, Params, Text, Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(TrainConfig):
  """The teacher's training.

  shift: of the training levels (flow, Eq. 3); caption_dropout: share of examples that are trained
  on the empty prompt. frames: latent frames of the windows of a clip that it is trained on, from
  anywhere in it; 0: whole clips. openings: share of windows that are a clip's first frames whatever
  is drawn: a caption tells a direction that a clip may keep to its first wall alone.
  """

  shift: float = 5.0
  caption_dropout: float = 0.1
  frames: int = 0
  openings: float = dataclasses.field(default=0.0, metadata={"since": "2026-11"})

  def __post_init__(self):
    super().__post_init__()
    above(0, shift=self.shift)
    within(0, 1, caption_dropout=self.caption_dropout, openings=self.openings)


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
      examples = example_keys(key, part["example_id"])
      # [b 3]: caption dropout, sigma, noise
      keys = jax.vmap(lambda k: jax.random.split(k, 3))(examples)
      dropped = jax.vmap(jax.random.uniform)(keys[:, 0]) < config.caption_dropout
      text = jnp.where(dropped[:, None, None], negative, part["text"])
      x0, start = part["latents"], part.get("start")
      if config.frames:
        x0, first = windows(examples, x0, config.frames, config.openings)
        start = None if start is None else start + first
      sigma = sample_sigma(keys[:, 1], config.shift)
      eps = example_normal(keys[:, 2], x0.shape[1:])
      bound = bind(network, params, text, start)
      return flow_matching(bound, x0, eps, sigma).mean(), {}

    return averaged_update(config, state, loss, optimizer, batch, mean=mean)

  return step


def held_out_loss(
  config: TeacherConfig, network: Network, params: Params, batch: Batch, key: Key
) -> jax.Array:
  """Returns the mean loss of clips that are not trained on, at levels evenly spread over those of
  training and with noise that depends on the key alone: of one training to the next, and from one
  update to another, the weights alone differ. batch: {latents, text}, and start, as make_step's.
  """
  x0, count = batch["latents"], len(batch["latents"])
  sigma = shift_sigma((jnp.arange(count) + 0.5) / count, config.shift)
  eps = example_normal(example_keys(key, jnp.arange(count)), x0.shape[1:])
  bound = bind(network, params, batch["text"], batch.get("start"))
  return flow_matching(bound, x0, eps, sigma).mean()


def windows(keys: Key, clips: Video, frames: int, openings: float = 0.0) -> tuple[Video, jax.Array]:
  """Returns a window of `frames` frames of each clip [b f h w c] and its first frame [b]: 0 for a
  share `openings` of them, else evenly drawn. keys: [b].
  """
  last = clips.shape[1] - frames
  # 3 and 4: behind the splits that the step takes of the same keys
  firsts = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 3), (), 0, last + 1))(keys)
  if openings:
    opens = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 4)))(keys) < openings
    firsts = jnp.where(opens, 0, firsts)
  cut = jax.vmap(lambda clip, at: jax.lax.dynamic_slice_in_dim(clip, at, frames))
  return cut(clips, firsts), firsts
