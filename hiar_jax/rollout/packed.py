"""Long videos section by section from packed context (FramePack, arXiv 2504.12626, section 3)."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models.frames import Bound, Frames, Network, Out, bind
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.orders import Step, Steps, plan
from hiar_jax.packing.rows import History, Row, groups_of_row, tables
from hiar_jax.packing.schedule import Schedule
from hiar_jax.packing.similarity import choose
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.teacher_sampler import sample_trajectory
from hiar_jax.types import Block, Key, Params, Text, Video

Videos = tuple[Video, ...]  # a video, and where that is something else what history shows of it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SectionSampler:
  """What samples a section of a packed model, whatever the length of the video and the order.

  sigmas: levels of a section's steps, falling. negative: text [1 l d], unused where guidance is 0.
  frame: the shape [h w c]. key: of the noise. published: as in packing.orders.plan. solver:
  rollout.solvers. codebook: what history shows is replaced by its centroids. distilled: the network
  takes the guidance as an input, and there is no second forward.
  """

  network: Network
  schedule: Schedule
  history: History
  sigmas: jax.Array
  negative: Text
  guidance: float
  key: Key
  frame: tuple[int, int, int]
  distilled: bool = False
  published: bool = False
  solver: str = "euler"
  codebook: Codebook | None = None

  def bind(self, params: Params, text: Text, seeds: jax.Array) -> Callable[[Video, Row], Block]:
    """Returns make(shown, row) -> the sections of a row, clean [b k h w c], from what history shows
    of the video. Traced.

    text: [b l d], or [b sections l d], one for each section. seeds: [b], or [b sections]: a section
    with another seed is drawn anew, the others draw what they drew.
    """
    schedule, history, last = self.schedule, self.history, (len(self.sigmas) - 1,)
    one_text = text if text.ndim == 3 else text[:, 0]
    scales = jnp.full(len(seeds), 1.0 + self.guidance) if self.distilled else None
    bind_text = functools.partial(bind, self.network, params, guidance=scales)
    bound = bind_text(one_text)
    unconditional = bind(self.network, params, jnp.broadcast_to(self.negative, one_text.shape))
    noise_of = section_noise(self.key, seeds, (schedule.generate, *self.frame))

    def make(shown, row):
      eps = jnp.concatenate([noise_of(number) for number in row.sections], axis=1)
      row = choose(schedule, history, shown, row)
      groups = functools.partial(
        groups_of_row, schedule, history, shown, row, patch=self.network.patch
      )
      heard = bound
      if text.ndim == 4:
        heard = hear_each([bind_text(text[:, n]) for n in row.sections], schedule.generate)
      second = 0.0 if self.distilled else self.guidance  # of a second forward
      points = sample_trajectory(
        heard, unconditional, eps, self.sigmas, last, second, groups=groups, solver=self.solver
      )
      return points[:, 0]

    return make

  def with_shown(self, video: Video) -> Videos:
    """Returns the video, and where that is something else what history shows of it."""
    return (video,) if self.codebook is None else (video, self.codebook.discretise(video))

  def begin(self, batch: int, frames: int, given: Video | None, behind: Video | None) -> Videos:
    """Returns the videos in which `frames` new frames [b f h w c] are to be made between others."""
    # NaN: what is read before it is made would show
    empty = jnp.full((batch, frames, *self.frame), jnp.nan)
    videos = (empty,) * (1 if self.codebook is None else 2)
    for part, side in ((given, 0), (behind, 1)):
      if part is not None:
        pairs = zip(self.with_shown(part), videos, strict=True)
        videos = tuple(jnp.concatenate(p[:: -1 if side else 1], axis=1) for p in pairs)
    return videos

  def advance(self, make: Callable[[Video, Row], Block], videos: Videos, row: Row) -> Videos:
    """Returns the videos with the sections of a row. make: as `bind` returns it."""
    parts = zip(videos, self.with_shown(make(videos[-1], row)), strict=True)
    return tuple(video.at[:, row.generates].set(part) for video, part in parts)

  def plan(self, steps: Steps, given: int, behind: int, loop: bool) -> list[Step]:
    """Returns packing.orders.plan of the steps between so many given frames."""
    where = dict(given=given, behind=behind, loop=loop, published=self.published)
    return plan(self.schedule, steps, **where, similar=self.history.similar)


def make_sampler(
  sections: SectionSampler, steps: Steps, frames: int, *, loop: bool = False
) -> Callable[..., Video]:
  """Returns generate(params, text, seeds, given=None, behind=None) -> latents [b given + f + behind
  h w c].

  Traced; the caller jits. A video depends on its own text and seed, not on the rest of the batch.

  steps: packing.orders. frames: new ones, whole sections. text, seeds: as SectionSampler.bind.
  given, behind: clean frames [b k h w c] before and behind the new ones. loop: as in
  packing.orders.plan.
  """

  def generate(params, text, seeds, given=None, behind=None):
    make = sections.bind(params, text, seeds)
    videos = sections.begin(len(seeds), frames, given, behind)
    ends = [0 if part is None else part.shape[1] for part in (given, behind)]
    for table in tables(sections.plan(steps, *ends, loop)):
      videos, _ = jax.lax.scan(
        lambda videos, row: (sections.advance(make, videos, row), None), videos, table
      )
    return videos[0]

  return generate


def make_stepper(
  sections: SectionSampler, steps: Steps, frames: int, *, loop: bool = False
) -> Callable[..., Iterator[tuple[Video, np.ndarray]]]:
  """Returns generate(params, text, seeds, given=None, behind=None), which yields after each step
  (latents [b given + f + behind h w c], which of the frames are made, bool [given + f + behind]).

  Arguments as make_sampler, whose video the last one is. Frames that are not made are NaN. It jits,
  and compiles one program for each table of the steps.
  """
  begin = jax.jit(sections.begin, static_argnums=(0, 1))

  @functools.cache
  def program(table: int, given: int, behind: int):
    # a loop over rows that are constants, as make_sampler's: then both round alike
    rows = tables(planned(given, behind))[table]

    @jax.jit
    def advance(params, text, seeds, videos, at):
      make = sections.bind(params, text, seeds)
      if len(rows.generates) == 1:
        return sections.advance(make, videos, jax.tree.map(lambda x: jnp.asarray(x[0]), rows))

      def one(i, videos):
        return sections.advance(make, videos, jax.tree.map(lambda x: jnp.asarray(x)[i], rows))

      return jax.lax.fori_loop(at, at + 1, one, videos)

    return advance

  @functools.cache
  def planned(given: int, behind: int) -> list[Step]:
    return sections.plan(steps, given, behind, loop)

  def generate(params, text, seeds, given=None, behind=None):
    ends = [0 if part is None else part.shape[1] for part in (given, behind)]
    videos = begin(len(seeds), frames, given, behind)
    made = np.ones(videos[0].shape[1], bool)
    made[ends[0] : ends[0] + frames] = False
    counts = [len(table.generates) for table in tables(planned(*ends))]
    places = [(table, at) for table, count in enumerate(counts) for at in range(count)]
    for step, (table, at) in zip(planned(*ends), places, strict=True):
      videos = program(table, *ends)(params, text, seeds, videos, at)
      made = made.copy()
      made[step.generates] = True
      yield videos[0], made

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
