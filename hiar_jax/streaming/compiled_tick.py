"""The compiled tick: a model's weights on the devices of a layout, and the programs that advance a
pipeline, compiled once and shared by all generations.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.method import Method, MethodConfig
from hiar_jax.models.frames import Bound, Network, bind
from hiar_jax.parallel.mesh import replicated
from hiar_jax.parallel.rules import sharded_shapes, tree_shardings
from hiar_jax.rollout import tick as ticks
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.rollout.pipeline import PipelineState
from hiar_jax.streaming import layout as layouts
from hiar_jax.streaming.layout import Layout
from hiar_jax.types import Block, Key, LatentShape, Params


@dataclasses.dataclass(frozen=True)
class TickOptions:
  """Options of streaming; None keeps the model's own value."""

  layout: Layout | None = None  # of the devices; None: as many as can be used
  window: int | None = None  # latent frames
  sink: int | None = None  # latent frames
  # `absolute`: the sink's true positions (as published); `relative`: carried along with the window
  sink_positions: str = "absolute"


@dataclasses.dataclass(frozen=True)
class StreamParts:
  """The parts of a model that a stream needs."""

  config: Network
  method: MethodConfig  # as trained
  sigmas: tuple[float, ...]  # noise levels, 1 first and 0 last
  params: Params
  key: Key  # of the noise
  size: tuple[int, int]  # latent height and width
  texts: Callable[[Sequence[str]], np.ndarray]  # prompts -> [n l d], as the network reads them
  identity: str  # differs where the numbers of two models differ

  @staticmethod
  def of(model: VideoModel) -> "StreamParts":
    """Returns the parts of a loaded model."""
    e = model.experiment
    return StreamParts(
      config=e.student_dit,
      method=e.history,
      sigmas=tuple(float(sigma) for sigma in model.run.sigmas),
      params=model.params(),
      # as the sampler's: a stream is the video that generate makes of the same seed
      key=model.run.noise_key,
      size=(e.latent.height, e.latent.width),
      texts=model.texts,
      identity=model.identity,
    )


class Engine:
  """A causal model on its devices, with its compiled pipelines.

  block: latent frames of a block. levels: noise levels, the number of blocks in flight. frame: the
  shape [h w c]. window: latent frames that a block sees, its own included. sigmas, identity: as
  StreamParts. saved_options: those of a snapshot that change numbers.

  Raises UserError where the method cannot be streamed, or the layout does not fit.
  """

  def __init__(
    self,
    model: VideoModel | StreamParts,
    options: TickOptions | None = None,
    devices=None,
    compiler_options: dict | None = None,
  ):
    """Places the weights on `devices` (default: all); nothing is compiled before it is needed.

    compiler_options: XLA's, for measurements and tests.
    """
    self.compiler_options = compiler_options
    self.parts = model if isinstance(model, StreamParts) else StreamParts.of(model)
    self.options = options = options or TickOptions()
    given = {"window": options.window, "sink": options.sink}
    changes = {name: value for name, value in given.items() if value is not None}
    row = dataclasses.replace(self.parts.method, **changes)
    if not row.window:  # a stream has no end, so its cache must not grow
      raise UserError(
        "history.window = 0: this model sees all frames, and a stream has no end; give a window in "
        "latent frames, as window=21"
      )
    kind(row)  # raises where the past is not for this window
    self.method: Method = row.at(self.parts.sigmas, options.sink_positions)
    if self.method.order != "step_first":  # the levels of the others cannot work at once
      raise UserError(
        f"history.order = {self.method.order!r} cannot be streamed level by level: a block "
        "starts only when the one before it is done, "
        "so there is never more than one to work on; generate whole videos with it (python -m "
        "hiar_jax.generate), or use a step_first model"
      )
    self.block, self.levels = self.method.block, self.method.levels
    self.window, self.sigmas = self.method.window, self.parts.sigmas
    self.frame = (*self.parts.size, self.parts.config.channels)
    self.identity = self.parts.identity
    levels, config, height = self.levels, self.parts.config, self.parts.size[0]
    devices = list(jax.devices() if devices is None else devices)
    self.layout = options.layout or layouts.widest(len(devices), levels, config, height)
    self.layout.check(levels, config, height)
    self.mesh: Mesh = self.layout.mesh(devices)
    shardings = tree_shardings(self.parts.params, self.mesh, config.sharding_rules)
    self.params = jax.device_put(self.parts.params, shardings)
    self.whole = replicated(self.mesh)  # for arrays that every device holds

  @functools.cached_property
  def main(self) -> "CompiledPipeline":
    """The pipeline of the method."""
    return CompiledPipeline(self, self.method)

  @functools.cached_property
  def head(self) -> "CompiledPipeline | None":
    """The pipeline that makes a clean sink before the main one starts; None without such a sink."""
    if not self.method.clean_sink:
      return None
    return CompiledPipeline(self, dataclasses.replace(self.method, sink_level="history"))

  @property
  def head_blocks(self) -> int:
    """Blocks of a clean sink."""
    return self.method.clean_sink // self.method.block

  @property
  def saved_options(self) -> dict[str, Any]:
    names = ("window", "sink", "sink_positions")
    return {name: getattr(self.method, name) for name in names}

  def check_start(self, frames: int) -> None:
    """Raises UserError where a video cannot start with so many latent frames."""
    if frames != 1 and frames % self.block:
      raise UserError(
        f"a start of {frames} latent frames: expected one (a picture), or whole blocks of "
        f"{self.block}"
      )

  def text(self, prompt: str) -> jax.Array:
    """Returns the encoded prompt [1 l d], replicated on every device."""
    return jax.device_put(np.asarray(self.parts.texts([prompt])), self.whole)

  def warm(self, prompt: str) -> None:
    """Compiles every program that a stream may need, so that no video waits for one."""
    text = self.text(prompt)
    for programs in filter(None, (self.head, self.main)):
      pipe = programs.start(text[None], np.zeros(1, np.int32))
      pipe = programs.recache(pipe, text, np.zeros(self.method.levels, bool))
      jax.block_until_ready(programs.tick(pipe, text, False))


class CompiledPipeline:
  """`prefill`, `tick` and `recache` of rollout.tick, compiled for one method with the weights of an
  engine. `bound` and `noise` may be overridden.
  """

  def __init__(self, engine: Engine, method: Method):
    self.engine = engine
    self.method = method
    parts = engine.parts
    # any length above the window: from there on the size of the past does not depend on it
    shape = LatentShape(method.window + method.block, *parts.size, parts.config.channels)

    def start(params, texts, seed, given):
      bound = self.bound(params, texts[0])
      pipe = ticks.empty(bound, method, shape, parts.key, seed)
      return pipe if given is None else ticks.prefill(bound, pipe, given, texts)

    def tick(params, pipe, text, recache):
      bound = self.bound(params, text)
      return ticks.tick(bound, self.noise(pipe), pipe, text, recache)

    def recache(params, pipe, text, due):
      return ticks.recache(self.bound(params, text), pipe, text, due)

    # every device holds the texts, whatever their length
    texts = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    seed = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(start, engine.params, texts, seed, None)
    self.shardings: PipelineState = tree_shardings(
      shapes, engine.mesh, parts.config.sharding_rules, root="pipeline"
    )
    # Without explicit output shardings the compiler may choose others than the inputs have, and the
    # next call would compile again. The old state is donated: caches are updated in place, and one
    # copy of them is enough.
    jit = functools.partial(jax.jit, compiler_options=engine.compiler_options)
    self._start = jit(start, out_shardings=self.shardings)
    self.compiled_tick = jit(tick, donate_argnums=1, out_shardings=(self.shardings, engine.whole))
    self._recache = jit(recache, donate_argnums=1, out_shardings=self.shardings)

  def bound(self, params: Params, text: jax.Array) -> Bound:
    """Returns the network with its weights and a text [b l d]."""
    return bind(self.engine.parts.config, params, text)

  def noise(self, pipe: PipelineState):
    """Returns (level, block number) -> noise [b k h w c]."""
    parts = self.engine.parts
    shape = (self.method.block, *parts.size, parts.config.channels)
    return block_noise(pipe.key, pipe.seed, shape)

  def abstract(self, text: jax.ShapeDtypeStruct) -> PipelineState:
    """Returns the shapes, dtypes and shardings of a state; text [b l d]."""
    texts = jax.ShapeDtypeStruct((1, *text.shape), text.dtype)
    seed = jax.ShapeDtypeStruct((text.shape[0],), jnp.int32)
    shapes = jax.eval_shape(self._start, self.engine.params, texts, seed, None)
    return sharded_shapes(shapes, self.shardings)

  def start(
    self, texts: jax.Array, seed: np.ndarray, given: np.ndarray | None = None
  ) -> PipelineState:
    """Returns a state that no new block has entered, after `given` clean latents [b f h w c].

    texts: [n b l d], one for each given block, or one.
    """
    with jax.set_mesh(self.engine.mesh):
      return self._start(self.engine.params, texts, jnp.asarray(seed, jnp.int32), given)

  def tick(
    self, pipe: PipelineState, text: jax.Array, recache: bool
  ) -> tuple[PipelineState, Block]:
    """Advances the pipeline by one block with text [b l d]; `pipe` is used up. See rollout.tick."""
    with jax.set_mesh(self.engine.mesh):
      return self.compiled_tick(self.engine.params, pipe, text, np.bool_(recache))

  def recache(self, pipe: PipelineState, text: jax.Array, due: np.ndarray) -> PipelineState:
    """Encodes the contexts of the levels `due` [s] again under the new text; `pipe` is used up."""
    with jax.set_mesh(self.engine.mesh):
      return self._recache(self.engine.params, pipe, text, due)
