"""Long videos section by section from packed context (FramePack, arXiv 2504.12626, section 3)."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from hiar_jax.models.frames import Network, bind
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.orders import plan
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import Schedule
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.teacher_sampler import sample_trajectory
from hiar_jax.types import Key, LatentShape, Text, Video


def make_sampler(
  network: Network,
  schedule: Schedule,
  history: History,
  steps: list[tuple[int, ...]],
  sigmas: jax.Array,
  *,
  negative: Text,
  guidance: float,
  key: Key,
  shape: LatentShape,
  published: bool = False,
  codebook: Codebook | None = None,
) -> Callable[..., Video]:
  """Returns generate(params, text, seeds [b], given=None) -> latents [b given + f h w c].

  Traced; the caller jits. A video depends on its own text and seed, not on the rest of the batch.

  text: [b l d]. steps: packing.orders. sigmas: levels of the Euler steps, falling. negative: text
  [1 l d], unused where guidance is 0. shape: of the new latents, whole sections. given: clean
  frames [b given h w c] before them. published: frame indices as in packing.orders.plan. codebook:
  what history shows is replaced by its centroids.
  """
  last = (len(sigmas) - 1,)

  def generate(params, text, seeds, given=None):
    bound = bind(network, params, text)
    unconditional = bind(network, params, jnp.broadcast_to(negative, text.shape))
    noise = block_noise(key, seeds, shape.block(schedule.generate))

    def with_shown(video):
      # the video, and where that is something else what history shows of it
      return (video,) if codebook is None else (video, codebook.discretise(video))

    def make_sections(videos, row):
      # one draw a section, whichever step makes it
      eps = jnp.concatenate([noise(0, number) for number in row.sections], axis=1)
      groups = functools.partial(groups_of_row, schedule, history, videos[-1], row)
      x = sample_trajectory(bound, unconditional, eps, sigmas, last, guidance, groups=groups)[:, 0]
      parts = zip(videos, with_shown(x), strict=True)
      return tuple(video.at[:, row.generates].set(part) for video, part in parts), None

    # NaN: what is read before it is made would show
    empty = jnp.full((len(seeds), *shape.clip), jnp.nan)
    first, videos = 0, (empty,) if codebook is None else (empty, empty)
    if given is not None:
      first = given.shape[1]
      videos = tuple(jnp.concatenate([part, empty], axis=1) for part in with_shown(given))
    for table in tables(plan(schedule, steps, given=first, published=published)):
      videos, _ = jax.lax.scan(make_sections, videos, table)
    return videos[0]

  return generate
