"""A live video: a generation without end whose prompt may change. Each tick yields a block of
latents, once the pipeline is full.

    engine = Engine(model, TickOptions())          # weights and programs, shared by generations
    video = LiveVideo(engine, "a red circle moving left", seed=1)
    while watching:
      if emitted := video.step():
        show(emitted.latents)

A new prompt holds from the next block that enters: blocks in flight keep theirs, so it is seen
`levels` blocks later.
"""

import dataclasses
from operator import index
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.files import reading
from hiar_jax.generation.prompts_file import check_seed
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.streaming import snapshot
from hiar_jax.streaming.compiled_tick import CompiledPipeline, Engine, StreamParts, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.packed_engine import PackedEngine, PackedPipeline
from hiar_jax.types import Block, PyTree

AnyEngine = Engine | PackedEngine


def open_engine(model: AnyEngine | VideoModel | StreamParts, options: TickOptions) -> AnyEngine:
  """Returns the engine of a model, itself where it is one. Raises UserError where the model cannot
  be streamed, or layout or window do not fit.
  """
  if isinstance(model, AnyEngine):
    return model
  if isinstance(model, VideoModel) and model.experiment.framepack:
    return PackedEngine.of(model, options)
  return Engine(model, options)


@dataclasses.dataclass(frozen=True)
class Emitted:
  """A finished block."""

  block: int  # its number in the video
  latents: Block  # [1 k h w c], clean


class LiveVideo:
  """A generation under way; see the module's docstring. Not thread-safe.

  decoder: the state of whoever decodes (a tree of arrays, or None), saved and restored with the
  rest. It comes back as a list of leaves.
  """

  decoder: PyTree = None

  def __init__(
    self,
    model: AnyEngine | VideoModel | StreamParts,
    prompt: str,
    seed: int = 0,
    options: TickOptions | None = None,
    start: np.ndarray | None = None,
  ):
    """Starts a video after `start`, clean latents [1 f h w c] of one frame (a picture) or of whole
    blocks (of a packed model of any frames); None: from nothing.

    options: for a model that is no engine yet. Raises UserError where the method cannot be
    streamed, or layout, window, sink or start do not fit.
    """
    self.engine = open_engine(model, options or TickOptions())
    if start is not None:
      frame = self.engine.frame
      if start.ndim != 5 or start.shape[0] != 1 or start.shape[2:] != frame or not start.shape[1]:
        raise UserError(
          f"a start of shape {list(start.shape)}: expected latents [1, frames, "
          f"{', '.join(map(str, frame))}]"
        )
      self.engine.check_start(start.shape[1])
    self.seed = seed
    self.prompt = prompt
    self.given_frames = 0 if start is None else start.shape[1]
    self._text = self.engine.text(prompt)  # of the next block that enters
    # (latents, prompt) of a clean sink's finished blocks; None: no such sink, or it is whole.
    # A start takes the sink's place: given frames are clean anyway.
    self._head: list[tuple[np.ndarray, str]] | None = None
    if start is None and self.engine.head:
      self._head = []
    self._prompts: dict[int, str] = {}  # of the blocks in flight
    self._recache_from: set[int] = set()  # blocks in flight before which contexts are recached
    self._begin(None if start is None else np.asarray(start, np.float32), None)

  def _begin(self, given: np.ndarray | None, texts: jax.Array | None) -> None:
    """Fills a new pipeline with given latents [1 f h w c] under texts [n 1 l d] (None: the
    prompt's).
    """
    k = self.engine.block
    blocks = 0 if given is None else -(-given.shape[1] // k)  # a picture counts as a block
    if texts is None:
      texts = jnp.stack([self._text] * max(blocks, 1))
    self._pipe = self._programs.start(texts, np.asarray([self.seed]), given)
    self._block = self._first = blocks

  @property
  def _programs(self) -> CompiledPipeline | PackedPipeline:
    return self.engine.main if self._head is None else self.engine.head

  @property
  def levels(self) -> int:
    """Noise levels, the number of blocks in flight."""
    return self.engine.levels

  @property
  def next_block(self) -> int:
    """Number of the block that enters next.

    While a clean sink is made, the pipeline counts on behind its last block, but those blocks are
    dropped: the block after the sink enters when the sink is whole.
    """
    return self._block if self._head is None else min(self._block, self.engine.head_blocks)

  def step(self) -> Emitted | None:
    """Runs one tick and returns the block that left the pipeline, None while it fills.

    Returns before the devices are done; reading the latents waits for them.
    """
    entering = self._block
    leaving = entering - (self.levels - 1)
    # Level j works on block n - j in this tick. Contexts are encoded again at the one level that a
    # block of `_recache_from` has reached, just before it is denoised there.
    blocks = [entering - level for level in range(self.levels)]
    due = np.asarray([block in self._recache_from and self._is_there(block) for block in blocks])
    if due.any():
      self._pipe = self._programs.recache(self._pipe, self._text, due)
    self._pipe, latents = self._programs.tick(
      self._pipe, self._text, entering in self._recache_from
    )
    self._prompts[entering] = self.prompt
    self._block = entering + 1
    if leaving < self._first:
      return None  # the last level worked on a block that does not exist
    prompt = self._prompts.pop(leaving)
    self._recache_from.discard(leaving)
    if self._head is not None:
      self._grow_head(latents, prompt)
    return Emitted(leaving, latents)

  def _is_there(self, block: int) -> bool:
    """Tells a block of the video from one that the pipeline merely counts; see next_block."""
    return self._first <= block and (self._head is None or block < self.engine.head_blocks)

  def _grow_head(self, latents: Block, prompt: str) -> None:
    """Adds a block to the clean sink; once it is whole, begins the main pipeline after it (SAF)."""
    self._head.append((np.asarray(latents), prompt))
    if len(self._head) < self.engine.head_blocks:
      return
    head, self._head = self._head, None
    # a change of prompt may be due at the block after the sink, which has not entered yet
    recache_next = len(head) in self._recache_from
    self._begin(
      np.concatenate([latents for latents, _ in head], axis=1),
      jnp.stack([self.engine.text(prompt) for _, prompt in head]),
    )
    self._prompts = {}  # the blocks that followed the sink in its own pipeline are dropped
    self._recache_from = {self._block} if recache_next else set()

  def change_prompt(self, prompt: str, recache: bool = False) -> int:
    """Sets the prompt from the next block that enters on; returns its number.

    recache: each level encodes its contexts again under the new prompt, just before that block
    reaches it (LongLive); otherwise they stay as they are. It costs a forward of a window in each
    of the next `levels` ticks.
    """
    self.prompt = prompt
    self._text = self.engine.text(prompt)
    if recache and self.next_block > 0:
      self._recache_from.add(self.next_block)
    else:
      self._recache_from.discard(self.next_block)
    return self.next_block

  @property
  def in_flight(self) -> list[tuple[int, int, str]]:
    """(level that it waits for, block, prompt) of the blocks in the pipeline, the oldest last."""
    blocks = ((level, self._block - level) for level in range(1, self.levels))
    return [
      (level, block, self._prompts[block]) for level, block in blocks if self._is_there(block)
    ]

  # ----------------------------------------------------------------------------------------- saving

  def save(self, directory: str | os.PathLike) -> None:
    """Writes a snapshot to resume from, atomically; one that is there already is replaced.

    Raises UserError where the disk is full.
    """
    head = [latents for latents, _ in self._head or []]
    arrays = {"pipe": self._pipe, "text": self._text}
    if head:
      arrays["head"] = np.concatenate(head, axis=1)
    metadata = {
      "identity": self.engine.identity,
      "options": dict(self.engine.saved_options),
      "text": {"shape": list(self._text.shape), "dtype": str(self._text.dtype)},
      "seed": self.seed,
      "prompt": self.prompt,
      "block": self._block,
      "first": self._first,
      "given_frames": self.given_frames,
      "prompts": [[block, prompt] for block, prompt in self._prompts.items()],
      "anew": sorted(self._recache_from),  # its name in the first snapshots
      "head": None if self._head is None else [prompt for _, prompt in self._head],
    }
    snapshot.write(directory, arrays, metadata, self.decoder)

  @classmethod
  def restore(
    cls,
    directory: str | os.PathLike,
    model: AnyEngine | VideoModel | StreamParts,
    layout: Layout | None = None,
  ) -> "LiveVideo":
    """Resumes what `save` wrote; the frames that follow do not depend on the layout.

    layout: for a model that is no engine yet; None: as many devices as can be used. Raises
    UserError where nothing is saved, or it is damaged, or of another model, window or sink.
    """
    metadata = snapshot.read_metadata(directory, model.identity)
    with reading(directory, snapshot.ADVICE, TypeError):  # of an option that there is not
      options = TickOptions(layout=layout, **metadata["options"])
    model = open_engine(model, options)
    snapshot.check_options(directory, metadata, model.saved_options)
    self = cls.__new__(cls)  # without __init__, which would start a pipeline
    self.engine = model
    with reading(directory, snapshot.ADVICE):
      # set before the arrays are read: whether there is a head decides which pipeline's they are
      head = self._take(metadata)
      text = _abstract_text(metadata["text"], model.whole)
    abstract = {"pipe": self._programs.abstract(text), "text": text}
    if head:
      # the blocks of the head lie one behind another in time: [b (blocks k) h w c]
      _, b, k, *rest = abstract["pipe"].latents.shape
      abstract["head"] = jax.ShapeDtypeStruct(
        (b, k * len(head), *rest), jnp.float32, sharding=model.whole
      )
    arrays, self.decoder = snapshot.read(directory, metadata, abstract)
    self._pipe = arrays["pipe"]
    self._text = arrays["text"]
    if head:
      latents = np.split(np.asarray(arrays["head"]), len(head), axis=1)
      self._head = list(zip(latents, head, strict=True))
    return self

  def _take(self, metadata: dict[str, Any]) -> list[str] | None:
    """Sets what a snapshot's metadata says of the video; returns the prompts of its head. Raises
    errors of any kind where it is damaged.
    """
    self.seed = check_seed(metadata["seed"])
    self.prompt = _text(metadata["prompt"])
    self.given_frames = index(metadata["given_frames"])
    self._block, self._first = index(metadata["block"]), index(metadata["first"])
    self._prompts = {index(block): _text(prompt) for block, prompt in metadata["prompts"]}
    self._recache_from = {index(block) for block in metadata["anew"]}
    head = metadata["head"]
    if head is not None and self.engine.head is None:
      raise ValueError("a clean sink is being made, and this model has none")
    self._head = None if head is None else []
    self.in_flight  # noqa: B018  # each block has a prompt
    return None if head is None else [_text(prompt) for prompt in head]


def _abstract_text(stored: dict[str, Any], sharding: jax.sharding.Sharding):
  """Returns the shape and dtype of a text [1 l d] as a snapshot's metadata has them."""
  shape, dtype = tuple(map(index, stored["shape"])), jnp.dtype(stored["dtype"])
  if len(shape) != 3 or shape[0] != 1 or min(shape) < 1 or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"a text of {dtype} {shape}")
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f"{value!r} for a prompt")
  return value
