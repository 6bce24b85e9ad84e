"""What a step needs to know of the task: how a batch becomes latents and text, and their sizes."""

from collections.abc import Callable
import dataclasses

import jax

from hiar_jax.method import History
from hiar_jax.models.dit import DiTConfig
from hiar_jax.rollout.past import ring as caches
from hiar_jax.training.state import example_keys, example_normal
from hiar_jax.types import Batch, Key, Text, Video


@dataclasses.dataclass(frozen=True)
class Task:
  """encode: batch -> latents [b f h w c]; embed: a batch's tokens (ids [b l], or texts already) ->
  text [b l d].

  negative: the text that guidance leads away from, for texts of that shape. frames, height, width,
  channels: of the latents.
  """

  encode: Callable[[Batch], Video]
  embed: Callable[[jax.Array], Text]
  negative: Callable[[Text], Text]
  frames: int
  height: int
  width: int
  channels: int

  @property
  def clip(self) -> tuple[int, int, int, int]:
    return (self.frames, self.height, self.width, self.channels)


def block_noise(
  key: Key, index: jax.Array, history: History, task: Task
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """noise(level, block) -> [b k h w c]: what an example draws there, whatever else is in the batch.

  index [b].
  """
  keys = example_keys(key, index)
  shape = (history.block, *task.clip[1:])

  def noise(level, block):
    return example_normal(
      jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, level), block))(keys), shape
    )

  return noise


def empty_cache(
  config: DiTConfig, history: History, task: Task, batch: int, frames: int | None = None
) -> caches.Cache:
  """A cache for `batch` clips of the task (or of more frames)."""
  return caches.empty(
    config, history, batch=batch, frames=frames or task.frames, height=task.height, width=task.width
  )
