"""Long videos section by section from packed context (FramePack, arXiv 2504.12626, section 3)."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp

from hiar_jax.models.frames import Bound, Frames, Network, Out, bind
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.orders import plan
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import Schedule
from hiar_jax.packing.similarity import choose
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
  distilled: bool = False,
  key: Key,
  shape: LatentShape,
  loop: bool = False,
  published: bool = False,
  solver: str = "euler",
  codebook: Codebook | None = None,
) -> Callable[..., Video]:
  """Returns generate(params, text, seeds, given=None, behind=None) -> latents [b given + f + behind
  h w c].

  Traced; the caller jits. A video depends on its own text and seed, not on the rest of the batch.

  text: [b l d], or [b sections l d], one for each section. seeds: [b], or [b sections]: a section
  with another seed is drawn anew, the others draw what they drew. steps: packing.orders. sigmas:
  levels of a section's steps, falling. negative: text [1 l d], unused where guidance is 0. shape:
  of the new latents, whole sections. given, behind: clean frames [b k h w c] before and behind
  them. loop, published: as in packing.orders.plan. solver: rollout.solvers. codebook: what history
  shows is replaced by its centroids. distilled: the network takes the guidance as an input, and
  there is no second forward.
  """
  last = (len(sigmas) - 1,)

  def generate(params, text, seeds, given=None, behind=None):
    one_text = text if text.ndim == 3 else text[:, 0]
    scales = jnp.full(len(seeds), 1.0 + guidance) if distilled else None
    bind_text = functools.partial(bind, network, params, guidance=scales)
    bound = bind_text(one_text)
    unconditional = bind(network, params, jnp.broadcast_to(negative, one_text.shape))
    noise_of = section_noise(key, seeds, shape.block(schedule.generate))

    def with_shown(video):
      # the video, and where that is something else what history shows of it
      return (video,) if codebook is None else (video, codebook.discretise(video))

    def make_sections(videos, row):
      eps = jnp.concatenate([noise_of(number) for number in row.sections], axis=1)
      row = choose(schedule, history, videos[-1], row)
      groups = functools.partial(
        groups_of_row, schedule, history, videos[-1], row, patch=network.patch
      )
      heard = bound
      if text.ndim == 4:
        heard = hear_each([bind_text(text[:, n]) for n in row.sections], schedule.generate)
      second = 0.0 if distilled else guidance  # of a second forward
      points = sample_trajectory(
        heard, unconditional, eps, sigmas, last, second, groups=groups, solver=solver
      )
      parts = zip(videos, with_shown(points[:, 0]), strict=True)
      return tuple(video.at[:, row.generates].set(part) for video, part in parts), None

    # NaN: what is read before it is made would show
    videos = (jnp.full((len(seeds), *shape.clip), jnp.nan),) * (1 if codebook is None else 2)
    for part, side in ((given, 0), (behind, 1)):
      if part is not None:
        pairs = zip(with_shown(part), videos, strict=True)
        videos = tuple(jnp.concatenate(p[:: -1 if side else 1], axis=1) for p in pairs)
    ends = [0 if part is None else part.shape[1] for part in (given, behind)]
    where = dict(given=ends[0], behind=ends[1], loop=loop, published=published)
    for table in tables(plan(schedule, steps, **where, similar=history.similar)):
      videos, _ = jax.lax.scan(make_sections, videos, table)
    return videos[0]

  return generate


def section_noise(
  key: Key, seeds: jax.Array, block: tuple[int, int, int, int]
) -> Callable[[jax.Array], jax.Array]:
  """Returns noise(section) -> [b k h w c], one draw a section, whichever step makes it.

  seeds: [b], or [b sections]. block: the shape [k h w c].
  """
  if seeds.ndim == 1:
    return functools.partial(block_noise(key, seeds, block), 0)
  return lambda section: block_noise(key, seeds[:, section], block)(0, section)


def hear_each(bounds: Sequence[Bound], width: int) -> Callable[[tuple[Frames, ...]], Out]:
  """Returns forward(groups) in which section i of the noisy group hears the text of bounds[i].

  The sections, `width` frames each, see each other; a network of packed frames takes one text, so
  there is a forward for each, of which the frames of its section count.
  """

  def forward(groups):
    outs = [bound(groups) for bound in bounds]
    parts = [out.velocity[-1][:, i * width : (i + 1) * width] for i, out in enumerate(outs)]
    return outs[0].replace(velocity=(*outs[0].velocity[:-1], jnp.concatenate(parts, axis=1)))

  return forward
