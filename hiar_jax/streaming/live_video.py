"""A generation under way: one tick after another, each a block of latents once the pipe is full;
prompts may change on the way.

    engine = Engine(model, Options())              # weights and programs, shared by generations
    generation = Generation(engine, "a red circle moving left", seed=1)
    while watching:
      if emitted := generation.step():
        show(emitted.latents)

A change of prompt belongs to the next block that enters: those in flight keep theirs, so it is seen
`levels` blocks later.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.streaming import snapshot
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.types import Block, PyTree


@dataclasses.dataclass(frozen=True)
class Emitted:
  """A finished block: its number in the video, its clean latents [1 k h w c], and the latent frames
  before it, given ones included.
  """

  block: int
  latents: Block
  frames_before: int


class LiveVideo:
  """See the module's docstring. Not for several threads at once.

  decoder: a place for the state of whoever decodes (a tree of arrays, or None): saved and restored
  with the rest.
  """

  decoder: PyTree = None

  def __init__(
    self,
    model: Engine | VideoModel | StreamParts,
    prompt: str,
    seed: int = 0,
    options: TickOptions | None = None,
    start: np.ndarray | None = None,
  ):
    """options: for a model that is no engine yet. start: given clean latents [1 f h w c], one
    frame's (a picture) or whole blocks'.

    Raises UserError where the method cannot be streamed, or layout, window, sink or start do not
    fit.
    """
    self.engine = model if isinstance(model, Engine) else Engine(model, options or TickOptions())
    if start is not None:
      _check_start(start, self.engine)
    self.seed, self.prompt = seed, prompt
    self.given_frames = 0 if start is None else start.shape[1]
    self._text = self.engine.text(prompt)
    self._head: list[np.ndarray] | None = [] if start is None and self.engine.head else None
    self._prompts: dict[int, str] = {}
    self._recache_from: set[int] = set()
    self._begin(None if start is None else np.asarray(start, np.float32), None)

  def _begin(self, given: np.ndarray | None, texts: jax.Array | None) -> None:
    """texts: [n 1 l d] of the given blocks, default the prompt's."""
    k = self.engine.plan.method.block
    blocks = 0 if given is None else -(-given.shape[1] // k)
    if texts is None:
      texts = jnp.stack([self._text] * max(blocks, 1))
    self._pipe = self._programs.start(texts, np.asarray([self.seed]), given)
    self._block = self._first = blocks

  @property
  def _programs(self):
    return self.engine.main if self._head is None else self.engine.head

  @property
  def levels(self) -> int:
    return self.engine.plan.levels

  @property
  def next_block(self) -> int:
    """The block that enters next.

    Those that follow a clean sink wait until it is whole: ticks pass meanwhile in which none
    enters.
    """
    return self._block if self._head is None else min(self._block, self.engine.head_blocks)

  def step(self) -> Emitted | None:
    """One tick: None while the pipe fills.

    Returns before the devices are done; reading the latents waits for them.
    """
    n, left = self._block, self._block - (self.levels - 1)
    due = np.asarray(
      [
        n - level in self._recache_from and self._is_there(n - level)
        for level in range(self.levels)
      ]
    )
    if due.any():
      self._pipe = self._programs.recache(self._pipe, self._text, due)
    self._pipe, latents = self._programs.tick(self._pipe, self._text, n in self._recache_from)
    self._prompts[n], self._block = self.prompt, n + 1
    if left < self._first:
      return None
    prompt = self._prompts.pop(left)
    self._recache_from.discard(left)
    emitted = Emitted(left, latents, self._frames_before(left))
    if self._head is not None:
      self._grow_head(latents, prompt)
    return emitted

  def _is_there(self, block: int) -> bool:
    """Whether a block that the pipe counts is one of the video; see next_block."""
    return self._first <= block and (self._head is None or block < self.engine.head_blocks)

  def _frames_before(self, block: int) -> int:
    k = self.engine.plan.method.block
    given = -(-self.given_frames // k)
    return self.given_frames + (block - given) * k

  def _grow_head(self, latents: Block, prompt: str) -> None:
    """A clean sink is made by a pipe of its own; when it is whole, the pipe proper starts after
    it.
    """
    self._head.append((np.asarray(latents), prompt))
    if len(self._head) < self.engine.head_blocks:
      return
    head, self._head = self._head, None
    recache_next = len(head) in self._recache_from
    self._begin(
      np.concatenate([latents for latents, _ in head], axis=1),
      jnp.stack([self.engine.text(prompt) for _, prompt in head]),
    )
    self._prompts, self._recache_from = {}, {self._block} if recache_next else set()

  def change_prompt(self, prompt: str, recache: bool = False) -> int:
    """For the blocks from the next one that enters on; returns its number.

    recache: each level encodes what it has shown again under the new prompt, just before that block
    reaches it; otherwise earlier blocks stay as they were shown. It costs a window's forward in
    each of the next `levels` ticks.
    """
    self.prompt, self._text = prompt, self.engine.text(prompt)
    if recache and self.next_block > 0:
      self._recache_from.add(self.next_block)
    else:
      self._recache_from.discard(self.next_block)
    return self.next_block

  @property
  def in_flight(self) -> list[tuple[int, int, str]]:
    """(level that it waits for, block, its prompt) of the blocks that have entered and not left,
    the oldest last.
    """
    blocks = ((level, self._block - level) for level in range(1, self.levels))
    return [
      (level, block, self._prompts[block]) for level, block in blocks if self._is_there(block)
    ]

  # ----------------------------------------------------------------------------------------- saving

  def save(self, directory: str | os.PathLike) -> None:
    """Writes all that is needed to go on, whole or not at all; what was saved there before is
    replaced.

    Raises UserError where the disk is full.
    """
    head = [latents for latents, _ in self._head or []]
    arrays = {
      "pipe": self._pipe,
      "text": self._text,
      **({"head": np.concatenate(head, axis=1)} if head else {}),
    }
    facts = {
      "identity": self.engine.parts.identity,
      "options": snapshot.options(self.engine.plan),
      "text": snapshot.shape(self._text),
      "seed": self.seed,
      "prompt": self.prompt,
      "block": self._block,
      "first": self._first,
      "given_frames": self.given_frames,
      "prompts": [[block, prompt] for block, prompt in self._prompts.items()],
      "anew": sorted(self._recache_from),
      "head": None if self._head is None else [prompt for _, prompt in self._head],
    }
    snapshot.write(directory, arrays, facts, self.decoder)

  @classmethod
  def restore(
    cls,
    directory: str | os.PathLike,
    model: Engine | VideoModel | StreamParts,
    layout: Layout | None = None,
  ) -> "LiveVideo":
    """What `save` wrote, to go on with the same frames on this layout (of an engine: its own; None:
    as many devices as can be used).

    Raises UserError where nothing is saved, where it is damaged, or of another model, window or
    sink.
    """
    facts = snapshot.read_metadata(directory)
    snapshot.check_identity(
      directory, facts, (model.parts if isinstance(model, Engine) else model).identity
    )
    if not isinstance(model, Engine):
      model = Engine(model, TickOptions(layout=layout, **facts["options"]))
    snapshot.check_options(directory, facts, snapshot.options(model.plan))
    self = cls.__new__(cls)
    self.engine, self.seed, self.prompt, self.given_frames = (
      model,
      facts["seed"],
      facts["prompt"],
      facts["given_frames"],
    )
    self._block, self._first = facts["block"], facts["first"]
    self._prompts, self._recache_from = (
      {int(block): prompt for block, prompt in facts["prompts"]},
      set(facts["anew"]),
    )
    self._head = None if facts["head"] is None else []
    arrays = snapshot.read(directory, facts, self._abstract(facts))
    self._pipe, self._text, self.decoder = (
      arrays["pipe"],
      arrays["text"],
      snapshot.decoder(directory),
    )
    if facts["head"]:
      latents = np.split(np.asarray(arrays["head"]), len(facts["head"]), axis=1)
      self._head = list(zip(latents, facts["head"], strict=True))
    return self

  def _abstract(self, facts: dict) -> dict:
    """The arrays of `save` as shapes that know where they lie."""
    text = snapshot.abstract(facts["text"], self.engine.whole)
    arrays = {"pipe": self._programs.abstract(text), "text": text}
    if facts["head"]:
      _, b, k, *rest = arrays["pipe"].latents.shape
      arrays["head"] = jax.ShapeDtypeStruct(
        (b, k * len(facts["head"]), *rest), jnp.float32, sharding=self.engine.whole
      )
    return arrays


def _check_start(start: np.ndarray, engine: Engine) -> None:
  """Raises UserError for a start that is neither one latent frame nor whole blocks, or of another
  size.
  """
  block, frame = engine.plan.method.block, (*engine.parts.size, engine.parts.config.channels)
  if start.ndim != 5 or start.shape[0] != 1 or start.shape[2:] != frame:
    raise UserError(
      f"a start of shape {list(start.shape)}: expected latents [1, frames, "
      f"{', '.join(map(str, frame))}]"
    )
  if start.shape[1] != 1 and (start.shape[1] < 1 or start.shape[1] % block):
    raise UserError(
      f"a start of {start.shape[1]} latent frames: expected one (a picture), or whole blocks of "
      f"{block}"
    )
