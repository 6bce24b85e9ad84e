"""What many generations share: a model's weights on the devices of a layout, and the programs that
move a pipe on, compiled once.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.models.dit import DiTConfig
from hiar_jax.rollout import tick as pipes
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.tick import PipelineMethod, PipelineState
from hiar_jax.streaming import layout as layouts
from hiar_jax.streaming.layout import Layout
from hiar_jax.types import Block, Key, Params


@dataclasses.dataclass(frozen=True)
class TickOptions:
  """How to stream. None: as the model has it.

  layout: devices; None: as many as can be used. window, sink: latent frames. sink_positions:
  `absolute`, the sink's true distance (as published), or `relative` to the window.
  """

  layout: Layout | None = None
  window: int | None = None
  sink: int | None = None
  sink_positions: str = "absolute"


@dataclasses.dataclass(frozen=True)
class StreamParts:
  """Of a model, what a stream needs. texts: prompts -> [n l d], as the network reads them;
  identity: differs where a number would differ.

  size: latent height and width. key: of the noise. history: as it was trained.
  """

  config: DiTConfig
  method: Method
  sigmas: tuple[float, ...]
  params: Params
  key: Key
  size: tuple[int, int]
  texts: Callable[[Sequence[str]], np.ndarray]
  identity: str

  @staticmethod
  def of(model: VideoModel) -> "StreamParts":
    e, run = model.experiment, model.run

    def texts(prompts: Sequence[str]) -> np.ndarray:
      model.prepare_texts(list(prompts))
      return np.asarray(run.task.embed(model.texts(list(prompts))))

    return StreamParts(
      e.student_dit,
      e.history,
      tuple(float(sigma) for sigma in run.sigmas),
      model.params(),
      jax.random.fold_in(jax.random.key(e.seed), 3),
      (e.latent.height, e.latent.width),
      texts,
      model.identity,
    )


class Engine:
  """See the module's docstring.

  Raises UserError where the method cannot be streamed, or the layout does not fit.
  """

  def __init__(
    self,
    model: VideoModel | StreamParts,
    options: TickOptions | None = None,
    devices=None,
    compiler_options: dict | None = None,
  ):
    """devices: those to use, default all; compiler_options: XLA's, for those who measure or
    test.
    """
    self.compiler_options = compiler_options
    self.parts = model if isinstance(model, StreamParts) else StreamParts.of(model)
    self.options = options = options or TickOptions()
    self.plan = PipelineMethod(
      _changed_method(self.parts.method, options), self.parts.sigmas, options.sink_positions
    )
    levels, config, height = self.plan.levels, self.parts.config, self.parts.size[0]
    devices = list(jax.devices() if devices is None else devices)
    self.layout = options.layout or layouts.widest(len(devices), levels, config, height)
    self.layout.check(levels, config, height)
    self.mesh: Mesh = self.layout.mesh(devices)
    self.params = jax.device_put(
      self.parts.params, layouts.params_sharding(self.parts.params, self.mesh)
    )

  @functools.cached_property
  def main(self) -> "CompiledPipeline":
    return CompiledPipeline(self, self.plan)

  @functools.cached_property
  def head(self) -> "CompiledPipeline | None":
    """What makes a clean sink before all else; None where the method has none."""
    if not self.plan.method.clean_sink:
      return None
    plain = dataclasses.replace(self.plan.method, sink_level="history")
    return CompiledPipeline(self, dataclasses.replace(self.plan, method=plain))

  @property
  def whole(self) -> NamedSharding:
    """On every device."""
    return layouts.replicated_sharding(self.mesh)

  @property
  def head_blocks(self) -> int:
    """Blocks of a clean sink."""
    return self.plan.method.clean_sink // self.plan.method.block

  def text(self, prompt: str) -> jax.Array:
    """[1 l d], on every device."""
    return jax.device_put(np.asarray(self.parts.texts([prompt])), self.whole)

  def warm(self, prompt: str) -> None:
    """Compiles now what would else be compiled in the midst of a video."""
    text = self.text(prompt)
    for programs in filter(None, (self.head, self.main)):
      pipe = programs.start(text[None], np.zeros(1, np.int32))
      pipe = programs.recache(pipe, text, np.zeros(self.plan.levels, bool))
      jax.block_until_ready(programs.tick(pipe, text, False))


class CompiledPipeline:
  """Compiled for one plan: `start`, `tick` and `show_again` of rollout.pipe, with the weights in
  place.
  """

  def __init__(self, engine: Engine, plan: PipelineMethod):
    self.engine, self.plan = engine, plan

  def jit(self, function, **options):
    return jax.jit(function, compiler_options=self.engine.compiler_options, **options)

  def network(self, params: Params):
    # a frame's may lie on several devices
    config = dataclasses.replace(self.engine.parts.config, merge_tokens=False)
    return functools.partial(dit.bind, config, params)

  def noise(self, pipe: PipelineState):
    parts = self.engine.parts
    shape = (self.plan.method.block, *parts.size, parts.config.channels)
    return block_noise(pipe.key, pipe.seed, shape)

  def empty(self, text: jax.Array, seed: jax.Array) -> PipelineState:
    """Traced; text [b l d]."""
    parts, method = self.engine.parts, self.plan.method
    height, width = parts.size
    return pipes.empty(
      self.plan,
      parts.config,
      text,
      parts.key,
      seed,
      frames=method.window + method.block,
      height=height,
      width=width,
    )

  @functools.cached_property
  def shardings(self) -> PipelineState:
    return layouts.state_sharding(self.plan.fused, self.engine.mesh)

  def abstract(self, text: jax.ShapeDtypeStruct) -> PipelineState:
    """The shapes of a pipe, and where they lie."""
    shapes = jax.eval_shape(self.empty, text, jax.ShapeDtypeStruct((text.shape[0],), jnp.int32))
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      shapes,
      self.shardings,
    )

  @functools.cached_property
  def _start(self):
    def start(params, texts, seed, given):
      pipe = self.empty(texts[0], seed)
      return (
        pipe
        if given is None
        else pipes.prefill(self.plan, self.network(params), pipe, given, texts)
      )

    return self.jit(start, out_shardings=self.shardings)

  def start(
    self, texts: jax.Array, seed: np.ndarray, given: np.ndarray | None = None
  ) -> PipelineState:
    """A pipe that nothing has entered, after `given` clean latents [b f h w c]; texts [n b l d],
    one for each given block, or one.
    """
    with jax.set_mesh(self.engine.mesh):
      return self._start(self.engine.params, texts, jnp.asarray(seed, jnp.int32), given)

  @functools.cached_property
  def compiled_tick(self):
    """tick(params, pipe, text, anew) -> (pipe, block), jitted; the old pipe's memory is reused."""

    def tick(params, pipe, text, recache):
      return pipes.tick(self.plan, self.network(params), self.noise(pipe), pipe, text, recache)

    return self.jit(tick, donate_argnums=1, out_shardings=(self.shardings, self.engine.whole))

  def tick(
    self, pipe: PipelineState, text: jax.Array, recache: bool
  ) -> tuple[PipelineState, Block]:
    with jax.set_mesh(self.engine.mesh):
      return self.compiled_tick(self.engine.params, pipe, text, np.bool_(recache))

  @functools.cached_property
  def _recache(self):
    def again(params, pipe, text, due):
      return pipes.recache(self.plan, self.network(params), pipe, text, due)

    return self.jit(again, donate_argnums=1, out_shardings=self.shardings)

  def recache(self, pipe: PipelineState, text: jax.Array, due: np.ndarray) -> PipelineState:
    """due: [s]"""
    with jax.set_mesh(self.engine.mesh):
      return self._recache(self.engine.params, pipe, text, due)


def _changed_method(method: Method, options: TickOptions) -> Method:
  """The model's, with what is to be otherwise; a stream has no end, so it needs a window."""
  changes = {
    name: getattr(options, name)
    for name in ("window", "sink")
    if getattr(options, name) is not None
  }
  method = dataclasses.replace(method, **changes)
  if not method.window:
    raise UserError(
      "history.window = 0: this model sees all frames, and a stream has no end; give a window in "
      "latent frames, as window=21"
    )
  return method
