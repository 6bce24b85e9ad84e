"""A packed model (FramePack) on its device, with the programs that make a video section by section
in the order of play.

It drives a LiveVideo as compiled_tick.Engine does: of one level, a block being a section. What a
section sees of the past is what the schedule names (rollout.packed_past), so memory does not grow.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import types
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.parallel.mesh import replicated
from hiar_jax.rollout import packed_past
from hiar_jax.rollout.packed import SectionSampler
from hiar_jax.rollout.packed_past import PackedPast
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.training.experiment import Experiment
from hiar_jax.types import Block, Params


def check(e: Experiment, options: TickOptions) -> None:
  """Raises UserError where a packed model cannot be streamed, or has no such option."""
  history, schedule = e.framepack.history, e.framepack.parsed
  plain = TickOptions(layout=Layout())
  given = {name: getattr(options, name) for name in ("window", "sink", "sink_positions")}
  wanted = {name: value for name, value in given.items() if value != getattr(plain, name)}
  axes = dataclasses.asdict(options.layout or plain.layout)
  wanted |= {f"{axis}_devices": size for axis, size in axes.items() if size > 1}
  if wanted:
    name, value = next(iter(wanted.items()))
    raise UserError(
      f"{name} = {value}: a packed model (framepack) makes a section at a time, on one device, "
      f"from the frames that {schedule.notation!r} names; leave {name} out"
    )
  instead = "python -m hiar_jax.generate --partial shows a video while it is made"
  if e.sample.order != "vanilla":
    raise UserError(
      f"order = {e.sample.order!r}: sections that are not made in the order of play (vanilla) "
      f"cannot be streamed; {instead}"
    )
  why = ""
  if history.similar:
    why = "framepack.sort = 'similarity' chooses among all frames of the past"
  elif schedule.before_tail == "ta":
    why = "an appended tail (ta) holds all frames of the past"
  elif schedule.after if e.framepack.published else schedule.end:
    why = "the frame indices of the groups behind a section need the video's length"
  if why:
    raise UserError(f"schedule {schedule.notation!r}: {why}, and a stream has no end; {instead}")


class PackedEngine:
  """See the module's docstring. Its generations share weights and programs.

  block: frames of a section. levels: 1. head, head_blocks: it makes no clean sink. window: latent
  frames of a start that a section can see, itself included.
  """

  levels = 1
  head = None
  head_blocks = 0
  sigmas = (1.0, 0.0)  # all steps of a section are one tick
  saved_options: Mapping[str, Any] = types.MappingProxyType({})  # none changes numbers

  def __init__(
    self,
    sections: SectionSampler,
    params: Params,
    texts: Callable[[Sequence[str]], np.ndarray],
    identity: str,
    devices=None,
  ):
    """Places the weights on the first of `devices` (default: all). texts, identity: as StreamParts
    has them.
    """
    self.sections, self.texts, self.identity = sections, texts, identity
    schedule = sections.schedule
    self.block, self.frame = schedule.generate, sections.frame
    self.window = sum(packed_past.slots(schedule)) + self.block
    self.layout = Layout()
    self.mesh: Mesh = self.layout.mesh(devices)
    self.whole = replicated(self.mesh)
    self.params = jax.device_put(params, self.whole)

  @staticmethod
  def of(model: VideoModel, options: TickOptions) -> "PackedEngine":
    """Loads a model. Raises UserError, before that, as `check`."""
    check(model.experiment, options)
    return PackedEngine(model.run.sections(), model.params(), model.texts, model.identity)

  @functools.cached_property
  def main(self) -> "PackedPipeline":
    """The pipeline of the model."""
    return PackedPipeline(self)

  def check_start(self, frames: int) -> None:
    """Takes any number of frames."""

  def text(self, prompt: str) -> jax.Array:
    """Returns the encoded prompt [1 l d]."""
    return jax.device_put(np.asarray(self.texts([prompt])), self.whole)

  def warm(self, prompt: str) -> None:
    """Compiles the program of a section, so that no video waits for it."""
    text = self.text(prompt)
    past = self.main.start(text[None], np.zeros(1, np.int32))
    jax.block_until_ready(self.main.tick(past, text, False))


class PackedPipeline:
  """`start`, `tick` and `recache` as those of CompiledPipeline, on a PackedPast."""

  def __init__(self, engine: PackedEngine):
    self.engine = engine
    sections, schedule = engine.sections, engine.sections.schedule

    def extend(latents, frames, part):
      return packed_past.extended(schedule, latents, frames, sections.with_shown(part)[-1])

    def tick(params, latents, text, seed, frames, row):
      block = sections.bind(params, text, seed)(latents, row)
      return extend(latents, frames, block), block

    # the old past is donated: one copy of it is enough
    jit = functools.partial(jax.jit, out_shardings=engine.whole)
    self._extend = jit(extend, donate_argnums=0)
    # two programs: of a past without a tail, and with one
    self.compiled_tick = jit(tick, donate_argnums=1)

  def abstract(self, text: jax.ShapeDtypeStruct) -> PackedPast:
    """Returns the shapes, dtypes and shardings of a past; text [b l d]."""
    shapes = jax.eval_shape(lambda: self._empty(np.zeros(text.shape[0], np.int32)))
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.engine.whole), shapes
    )

  def _empty(self, seed) -> PackedPast:
    return packed_past.empty(self.engine.sections.schedule, seed, self.engine.frame)

  def start(
    self, texts: jax.Array, seed: np.ndarray, given: np.ndarray | None = None
  ) -> PackedPast:
    """Returns the past of a video that begins with `given` clean latents [b f h w c]. texts: not
    read, given frames have none.
    """
    with jax.set_mesh(self.engine.mesh):
      past = jax.device_put(self._empty(np.asarray(seed, np.int32)), self.engine.whole)
      if given is None:
        return past
      latents = self._extend(past.latents, past.frames, given)
      return past.replace(latents=latents, frames=np.int32(given.shape[1]))

  def tick(self, past: PackedPast, text: jax.Array, recache: bool) -> tuple[PackedPast, Block]:
    """Makes a section with text [b l d]; the past's latents are used up."""
    sections = self.engine.sections
    row = packed_past.row_of(sections.schedule, past, published=sections.published)
    frames = np.int32(past.frames)
    with jax.set_mesh(self.engine.mesh):
      latents, block = self.compiled_tick(
        self.engine.params, past.latents, text, past.seed, frames, row
      )
    counted = {"frames": frames + self.engine.block, "sections": np.int32(past.sections) + 1}
    return past.replace(latents=latents, **counted), block

  def recache(self, past: PackedPast, text: jax.Array, due: np.ndarray) -> PackedPast:
    """Does nothing: a section reads its own prompt, and no context has been encoded."""
    return past
