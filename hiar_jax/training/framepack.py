"""FramePack's training (arXiv 2504.12626): flow matching of a section, given its packed context.

The network is the bidirectional teacher with an input projection for each kernel of the schedule.
A clip is a short video: an update draws a step of one of the orders for each example, which says
what is made and what is there to be read. The authors have published no training code; what their
sampler shows a section is what it is trained on here.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.errors import UserError, above, at_least, within
from hiar_jax.losses.flow_matching import sample_sigma
from hiar_jax.models.frames import Bound, Network, bind
from hiar_jax.packing.codebook import Codebook, CodebookConfig
from hiar_jax.packing.orders import Step, plan, steps_of
from hiar_jax.packing.rows import History, Row, frames_at, groups_of_row, tables
from hiar_jax.packing.schedule import Schedule, parse
from hiar_jax.packing.similarity import choose
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.training.lora import Adapters, LoRAConfig
from hiar_jax.training.state import TrainConfig, TrainState, averaged_update, identity
from hiar_jax.types import Batch, Key, Mean, Params, Text, Video


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramePackConfig(TrainConfig):
  """The training of a packed model.

  packing: the schedule of kernels in the paper's notation (packing.schedule). orders: those whose
  steps are drawn, by name (packing.orders). given: frames of a clip's start that are there before
  any section (1: an image). published: frame indices as in the published code, else the frames'
  own. history_level, hears, sort, time_weight, frame_seconds: packing.rows.History. history_noise:
  level up to which the context is noised, drawn evenly for each example (Helios); 0: none. shift,
  caption_dropout: as the teacher's. codebook: of +D schedules, whose history is replaced by its
  centroids. lora: adapters that are trained instead of all weights. distilled_guidance: the lowest
  and the highest g of flow.classifier_free_guidance that the model learns as an input, so that a
  step of sampling takes one forward; () = none.
  """

  packing: str
  orders: tuple[str, ...] = ("vanilla",)
  given: int = 0
  published: bool = False
  history_level: str = "section"
  hears: bool = True
  history_noise: float = 0.0
  shift: float = 5.0
  caption_dropout: float = 0.1
  sort: str = dataclasses.field(default="time", metadata={"since": "2026-11"})
  time_weight: float = dataclasses.field(default=1.0, metadata={"since": "2026-11"})
  frame_seconds: float = dataclasses.field(default=0.125, metadata={"since": "2026-11"})
  codebook: CodebookConfig = dataclasses.field(
    default=CodebookConfig(), metadata={"since": "2026-11"}
  )
  lora: LoRAConfig = dataclasses.field(default=LoRAConfig(), metadata={"since": "2026-11"})
  distilled_guidance: tuple[float, ...] = dataclasses.field(
    default=(), metadata={"since": "2026-11"}
  )

  def __post_init__(self):
    super().__post_init__()
    at_least(0, given=self.given)
    above(0, shift=self.shift)
    within(0, 1, caption_dropout=self.caption_dropout, history_noise=self.history_noise)
    if self.distilled_guidance:
      if len(self.distilled_guidance) != 2 or not 0 <= min(self.distilled_guidance):
        raise UserError(f"distilled_guidance = {self.distilled_guidance}: expected (low, high)")
      low, high = self.distilled_guidance
      at_least(low, **{"high of distilled_guidance": high})
    for order in self.orders:
      self._plan(order, 1)  # raises for what cannot be planned

  @property
  def parsed(self) -> Schedule:
    return parse(self.packing)

  @property
  def history(self) -> History:
    return History(self.history_level, self.hears, self.sort, self.time_weight, self.frame_seconds)

  def sections(self, frames: int) -> int:
    """Returns the sections of a clip of `frames` latent frames.

    Raises UserError where it is not the given frames and whole sections.
    """
    width = self.parsed.generate
    count, rest = divmod(frames - self.given, width)
    if rest or count < 1:
      raise UserError(
        f"framepack.packing = {self.packing!r} makes {width} frames a section: a clip of "
        f"{frames} latent frames is not framepack.given = {self.given} and whole sections"
      )
    return count

  def rows(self, frames: int) -> list[Row]:
    """Returns the steps of all orders on a clip as tables, one for each shape that a step can have:
    number of sections made, and tails.
    """
    sections = self.sections(frames)
    steps = [step for order in self.orders for step in self._plan(order, sections)]
    return tables(steps, ordered=False)

  def _plan(self, order: str, sections: int) -> list[Step]:
    return plan(
      self.parsed,
      steps_of(order, sections),
      given=self.given,
      published=self.published,
      similar=self.history.similar,
    )


class Frozen(NamedTuple):
  """What a step reads and nobody trains.

  negative: text [1 l d], which takes the place of a dropped caption. base: the parameters beside
  adapters.
  """

  negative: Text
  base: Params | None = None


def make_step(
  config: FramePackConfig,
  network: Network,
  optimizer,
  frames: int,
  *,
  mean: Mean = identity,
  codebook: Codebook | None = None,
  adapters: Adapters | None = None,
):
  """Returns step(state, batch, frozen) -> (state, metrics).

  batch: {latents [b frames h w c], text, example_id}, and start where the model embeds places.
  frozen: Frozen. mean: averages over devices. codebook: replaces the history of +D schedules.
  adapters: those that the state's parameters are; None: the network's own.
  """
  tables = config.rows(frames)
  counts = jnp.asarray([len(table.generates) for table in tables], jnp.float32)

  def step(state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, dict]:
    key = jax.random.fold_in(state.key, state.step)
    # one table for the batch: its steps are alike in shape
    which = jax.random.categorical(jax.random.fold_in(key, 0), jnp.log(counts))
    key = jax.random.fold_in(key, 1)

    def loss(params, part):
      keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key, part["example_id"]))
      dropped = jax.vmap(jax.random.uniform)(keys[:, 0]) < config.caption_dropout
      text = jnp.where(dropped[:, None, None], frozen.negative, part["text"])
      sigma = sample_sigma(keys[:, 1], config.shift)
      if adapters:
        params = adapters.merged(params, frozen.base)
      bound, clip = bind(network, params, text), part["latents"]
      start = part.get("start", jnp.zeros_like(part["example_id"]))
      shown = codebook.discretise(clip) if codebook else clip
      guided = None
      if config.distilled_guidance:
        ema = adapters.merged(state.ema, frozen.base) if adapters else state.ema
        guided = _guided(config, network, params, ema, part, frozen.negative, keys[:, 0])
      branches = [
        _loss_of(config, bound, clip, shown, start, sigma, keys[:, 2:], table, guided)
        for table in tables
      ]
      losses = jax.lax.switch(which, branches)
      if guided is None:
        return losses.mean(), {}
      plain, distilled = losses
      return (plain + distilled).mean(), {"distilled_guidance": distilled.mean()}

    return averaged_update(config, state, loss, optimizer, batch, mean=mean)

  return step


class Guided(NamedTuple):
  """Distilled guidance: the student, bound to the batch's captions and scales, and its teacher.

  g: [b]. teacher, negative: bound to the captions and to the negative text; they have no scale.
  """

  student: Bound
  teacher: Bound
  negative: Bound
  g: jax.Array

  def loss(self, groups) -> jax.Array:
    """Returns the mean square [b] between the student's velocity and the teacher's guided one."""
    teacher, negative = (
      bound(groups).velocity[-1] for bound in jax.lax.stop_gradient((self.teacher, self.negative))
    )
    g = self.g.reshape(-1, *(1,) * (teacher.ndim - 1))
    target = flow.classifier_free_guidance(teacher, negative, g)
    error = self.student(groups).velocity[-1] - jax.lax.stop_gradient(target)
    return jnp.mean(error**2, axis=range(1, error.ndim))


def _guided(
  config: FramePackConfig, network: Network, params, ema, part: Batch, negative: Text, keys: Key
) -> Guided:
  """Returns what the guided velocity is learnt from, g drawn evenly for each example. keys: [b].

  The teacher is the average of the weights in training, without the scale: Meng et al. (arXiv
  2210.03142, section 3) take a finished one, which a model that is only learning packed history
  does not have.
  """
  low, high = config.distilled_guidance
  # 1: behind the uniform number that the same key gives for caption dropout
  draw = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), minval=low, maxval=high))
  g, text = draw(keys), part["text"]
  return Guided(
    bind(network, params, text, guidance=1 + g),
    bind(network, ema, text),
    bind(network, ema, jnp.broadcast_to(negative, text.shape)),
    g,
  )


def _loss_of(
  config: FramePackConfig,
  bound: Bound,
  clip: Video,
  shown: Video,
  start,
  sigma,
  keys: Key,
  table: Row,
  guided: Guided | None = None,
) -> Callable[[], jax.Array | tuple[jax.Array, jax.Array]]:
  """Returns () -> the loss [b] of a step of the table, drawn for each example; with `guided` also
  that of distilled guidance, [b].

  shown: what its context is read from, before history_noise. start: [b], frames of its video before
  each clip: its first frame has that index. keys: [b 2].
  """

  def loss():
    row_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys[:, 0])
    steps = len(table.generates)
    drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, steps))(row_keys[:, 0])
    row = jax.tree.map(lambda x: jnp.asarray(x)[drawn], table)
    x0 = frames_at(clip, row.generates)
    eps = example_normal(keys[:, 1], x0.shape[1:])
    read = shown
    if config.history_noise:
      level = config.history_noise * jax.vmap(jax.random.uniform)(row_keys[:, 1])
      read = flow.add_noise(shown, example_normal(row_keys[:, 2], clip.shape[1:]), level)
    x = flow.add_noise(x0, eps, sigma)
    schedule, history = config.parsed, config.history
    at = choose(schedule, history, read, row).later(start)
    groups = groups_of_row(schedule, history, read, at, x, sigma, patch=bound.network.patch)
    error = bound(groups).velocity[-1] - flow.velocity_target(x0, eps)
    plain = jnp.mean(error**2, axis=range(1, x0.ndim))
    return plain if guided is None else (plain, guided.loss(groups))

  return loss
