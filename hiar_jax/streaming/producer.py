"""Video out while it is being made: one thread denoises, another decodes, the caller takes frames;
what lies between them is bounded.

    with Stream(generation, decoder, fps=16) as stream:
      for chunk in stream:
        show(chunk.frames)
        if bored:
          stream.change_prompt("a blue square moving up")

A caller that takes nothing holds the whole of it up; one that goes away (close, or a stream that is
not referred to any more) ends it.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
import dataclasses
import json
import os
import threading
from typing import Any, Protocol
import weakref

import jax
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.streaming.decoding import BlockDecoder
from hiar_jax.streaming.throughput import ThroughputMeter
from hiar_jax.streaming.timeline import Change
from hiar_jax.types import PyTree


class BlockSource(Protocol):
  """What a stream needs of streaming.generation.Generation."""

  prompt: str
  seed: int
  next_block: int
  in_flight: list[tuple[int, int, str]]
  decoder: PyTree

  def step(self) -> Any: ...
  def change_prompt(self, prompt: str, recache: bool = False) -> int: ...
  def save(self, directory: str | os.PathLike) -> None: ...


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The frames of one block: uint8 [n H W 3], the block's number and prompt, and the second at
  which the first of them is shown.

  What a video starts from (given frames) comes first, as a chunk of the block before the first new
  one.
  """

  frames: np.ndarray
  block: int
  prompt: str
  time: float


class Stream:
  """An iterator of chunks; see the module's docstring. Its methods may be called from any thread.

  blocks: how many to make, those of a saved stream included; None: without end. After them the
  iterator ends; `extend` lets it go on.
  changes: prompts by the block at which they enter. given: latents that the generation was started
  from, decoded first. prefetch: blocks that may wait for the decoder, and chunks that may wait for
  the caller.
  """

  def __init__(
    self,
    generation: BlockSource,
    decoder: BlockDecoder,
    *,
    fps: float,
    blocks: int | None = None,
    changes: Iterable[Change] = (),
    given: np.ndarray | None = None,
    prefetch: int = 2,
    saved: "Saved | None" = None,
  ):
    """saved: see `resume`."""
    at_least(1, prefetch=prefetch)
    # as it began, or was gone on with
    self.fps, self.prompt, self.seed = fps, generation.prompt, generation.seed
    self._work = work = _Work(generation, decoder, fps, blocks, changes, given, prefetch)
    if saved:
      work.frames, work.made, work.memory = saved.frames, saved.made, saved.memory
      work.chunks.extend(saved.chunks)
    self._end = weakref.finalize(self, work.close)
    work.begin()

  @classmethod
  def resume(
    cls, generation: BlockSource, decoder: BlockDecoder, latents: tuple[int, ...], **options
  ) -> "Stream":
    """Goes on with a generation that Stream.save wrote, right after the last chunk that was taken.
    latents: the shape of a block's.

    Raises UserError where the generation was not saved by a stream.
    """
    state, generation.decoder = generation.decoder, None
    if state is None:
      raise UserError(
        "this generation was saved without what its decoder remembers; give one that a stream saved"
      )
    facts = json.loads(bytes(np.asarray(state[0])))
    frames, leaves = state[1 : 1 + len(facts["chunks"])], state[1 + len(facts["chunks"]) :]
    chunks = [
      Chunk(np.asarray(pixels), *told) for pixels, told in zip(frames, facts["chunks"], strict=True)
    ]
    options.setdefault("changes", [Change(*told) for told in facts["changes"]])
    return cls(
      generation,
      decoder,
      **options,
      saved=Saved(facts["frames"], facts["made"], chunks, decoder.remember(leaves, latents)),
    )

  def __iter__(self) -> Iterator[Chunk]:
    return self

  def __next__(self) -> Chunk:
    return self._work.take()

  def change_prompt(self, prompt: str, recache: bool = False) -> int:
    """For the blocks that enter from now on; returns the first of them.

    recache: as Generation.change_prompt.
    """
    return self._work.call(lambda generation: generation.change_prompt(prompt, recache))

  def extend(self, blocks: int) -> None:
    """So many more than were asked for."""
    self._work.extend(blocks)

  def pause(self, wanted: bool = True) -> None:
    """No block is begun until pause(False)."""
    self._work.pause(wanted)

  def save(self, directory: str | os.PathLike) -> None:
    """Everything that is needed to go on after the last chunk that was taken, whole or not at all;
    the stream goes on too.
    """
    self._work.save(directory)

  @property
  def in_flight(self) -> list[tuple[int, int, str]]:
    """(level, block, prompt) of the blocks that are being denoised, as they were after the last
    tick.
    """
    return self._work.flight

  @property
  def taken(self) -> int:
    """Frames of the chunks that were taken."""
    return self._work.taken()

  @property
  def made(self) -> int:
    """Blocks that have left the pipe."""
    return self._work.made

  @property
  def speed(self) -> float | None:
    """Frames a second while it was at work, over the last chunks; None before there are two."""
    return self._work.speed()

  def close(self) -> None:
    """Ends both threads, at most one block later, and lets go of all that they held.

    Chunks that were not taken are lost.
    """
    self._end()

  def __enter__(self) -> "Stream":
    return self

  def __exit__(self, *exc) -> None:
    self.close()


@dataclasses.dataclass(frozen=True)
class Saved:
  """Of a stream, beside its generation: frames decoded so far, blocks made, chunks that nobody has
  taken, what the decoder remembers.
  """

  frames: int
  made: int
  chunks: Sequence[Chunk]
  memory: PyTree


@dataclasses.dataclass(frozen=True)
class _Block:
  number: int
  prompt: str
  latents: Any


class _Work:
  """What the two threads share.

  They refer to this and not to the Stream, so that a forgotten stream is collected, and ends them.
  """

  def __init__(self, generation, decoder, fps, blocks, changes, given, prefetch):
    self.generation, self.decoder, self.fps, self.blocks_wanted, self.prefetch = (
      generation,
      decoder,
      fps,
      blocks,
      prefetch,
    )
    self.changes = collections.deque(sorted(changes, key=lambda change: change.block))
    self.prompts = {block: prompt for _, block, prompt in generation.in_flight}
    self.flight: list[tuple[int, int, str]] = generation.in_flight
    self.memory: PyTree = None
    self.frames = 0  # decoded so far
    self.made = 0  # blocks that have left the pipe
    self.turn = threading.Condition()  # guards what follows
    self.blocks: collections.deque[_Block] = collections.deque()
    self.chunks: collections.deque[Chunk] = collections.deque()
    self.calls: collections.deque[tuple[Callable, Future]] = collections.deque()
    self.closed = self.paused = self.held = self.ticking = self.decoding = False
    self.error: BaseException | None = None
    self.clock = ThroughputMeter()
    if given is not None:
      self.blocks.append(_Block(generation.next_block - 1, generation.prompt, given))
    self.threads: list[threading.Thread] = []

  def begin(self) -> None:
    parts = (self._denoise, self._decode)
    self.threads = [
      threading.Thread(target=self._run, args=(part,), name=part.__name__, daemon=True)
      for part in parts
    ]
    for thread in self.threads:
      thread.start()

  def _run(self, part: Callable[[], bool]) -> None:
    """One part of the work until it says that there is no more; what goes wrong in it is raised
    where chunks are taken.
    """
    try:
      while part():
        pass
    except BaseException as error:
      with self.turn:
        self.error = self.error or error
        self._let_go(decoding_too=part == self._decode)

  def _let_go(self, decoding_too: bool = True) -> None:
    """Of the generation; what it has finished may still be decoded."""
    for _, answer in self.calls:
      answer.cancel()
    self.calls.clear()
    self.generation = None
    if decoding_too:
      self.closed, self.decoder, self.memory = True, None, None
    self.turn.notify_all()

  def close(self) -> None:
    with self.turn:
      self._let_go()
      self.blocks.clear()
      self.chunks.clear()
    for thread in self.threads:
      if thread is not threading.current_thread():  # a collection may happen in any thread
        thread.join()

  # -------------------------------------------------------------------------------------- denoising

  def _denoise(self) -> bool:
    """One tick, or one call; False at the end."""
    with self.turn:
      self.turn.wait_for(lambda: self.closed or self.calls or self._may_tick())
      if self.closed:
        return False
      generation, call = self.generation, self.calls.popleft() if self.calls else None
      self._at_work(ticking=True)
    try:
      if call:
        _answer(*call, generation)
      else:
        self._tick(generation)
    finally:
      with self.turn:
        self._at_work(ticking=False)
        self.turn.notify_all()
    return True

  def _may_tick(self) -> bool:
    return not (self.paused or self.held or self._has_enough()) and len(self.blocks) < self.prefetch

  def _has_enough(self) -> bool:
    return self.blocks_wanted is not None and self.made >= self.blocks_wanted

  def _tick(self, generation) -> None:
    entering = generation.next_block
    while self.changes and self.changes[0].block <= entering:
      change = self.changes.popleft()
      if change.recache or change.prompt != generation.prompt:
        generation.change_prompt(change.prompt, change.recache)
    self.prompts[entering] = generation.prompt
    emitted = generation.step()
    flight = generation.in_flight
    with self.turn:
      self.flight = flight
      if emitted is not None and not self.closed:
        prompt = self.prompts.pop(emitted.block)
        self.prompts = {
          block: prompt for block, prompt in self.prompts.items() if block > emitted.block
        }
        self.blocks.append(_Block(emitted.block, prompt, emitted.latents))
        self.made += 1

  # --------------------------------------------------------------------------------------- decoding

  def _decode(self) -> bool:
    """One block; False at the end."""
    with self.turn:
      room = lambda: self.held or len(self.chunks) < self.prefetch
      self.turn.wait_for(
        lambda: self.closed or (self.blocks and room()) or (self.error and not self.blocks)
      )
      if self.closed or not self.blocks:
        return False
      block, decoder, memory = self.blocks.popleft(), self.decoder, self.memory
      self._at_work(decoding=True)
      self.turn.notify_all()
    frames, memory = decoder(block.latents, memory)
    with self.turn:
      if not self.closed:
        self.chunks.append(Chunk(frames, block.number, block.prompt, self.frames / self.fps))
        self.frames, self.memory = self.frames + len(frames), memory
        self._at_work(decoding=False)
        self.clock.note(self.frames)
      self.turn.notify_all()
    return True

  def _at_work(self, ticking: bool | None = None, decoding: bool | None = None) -> None:
    self.ticking = self.ticking if ticking is None else ticking
    self.decoding = self.decoding if decoding is None else decoding
    self.clock.run(self.ticking or self.decoding)

  # ------------------------------------------------------------------------------ the caller's side

  def take(self) -> Chunk:
    with self.turn:
      self.turn.wait_for(lambda: self.closed or self.chunks or self._at_end())
      if not self.chunks:
        self._raise_error()
        raise StopIteration
      self.turn.notify_all()
      return self.chunks.popleft()

  def speed(self) -> float | None:
    with self.turn:
      return self.clock.speed()

  def taken(self) -> int:
    with self.turn:
      return self.frames - sum(len(chunk.frames) for chunk in self.chunks)

  def _at_end(self) -> bool:
    return (self.error is not None or self._has_enough()) and not (
      self.blocks or self.decoding or self.ticking
    )

  def _raise_error(self) -> None:
    if self.error:
      raise self.error

  def call(self, function: Callable) -> Any:
    """function(generation) in the thread that has it, between two ticks."""
    answer: Future = Future()
    with self.turn:
      self._check_open()
      self.calls.append((function, answer))
      self.turn.notify_all()
    try:
      return answer.result()
    except CancelledError:
      self._check_open()
      raise

  def _check_open(self) -> None:
    self._raise_error()
    if self.closed:
      raise UserError("this stream is closed; open another one")

  def extend(self, blocks: int) -> None:
    with self.turn:
      if self.blocks_wanted is not None:
        self.blocks_wanted += blocks
      self.turn.notify_all()

  def pause(self, wanted: bool) -> None:
    with self.turn:
      self.paused = wanted
      self.turn.notify_all()

  def save(self, directory: str | os.PathLike) -> None:
    """Waits until everything that has left the pipe is decoded, while nothing new enters."""
    with self.turn:
      self._check_open()
      self.held = True
      self.turn.notify_all()
      try:
        self.turn.wait_for(
          lambda: self.closed or self.error or not (self.ticking or self.blocks or self.decoding)
        )
        self._check_open()
        self.generation.decoder = self._state()
        self.generation.save(directory)
      finally:
        self.held = False
        self.turn.notify_all()

  def _state(self) -> list[np.ndarray | jax.Array]:
    """[facts, the chunks that nobody has taken yet, the decoder's memory]."""
    chunks = [[chunk.block, chunk.prompt, chunk.time] for chunk in self.chunks]
    changes = [[change.block, change.prompt, change.recache] for change in self.changes]
    facts = json.dumps(
      {"frames": self.frames, "made": self.made, "chunks": chunks, "changes": changes}
    ).encode()
    return [
      np.frombuffer(facts, np.uint8),
      *(chunk.frames for chunk in self.chunks),
      *jax.tree.leaves(self.memory),
    ]


def _answer(function: Callable, answer: Future, generation) -> None:
  """What a call raises is its caller's to know, not the stream's end."""
  if not answer.set_running_or_notify_cancel():
    return
  try:
    answer.set_result(function(generation))
  except BaseException as error:
    answer.set_exception(error)


def block_seconds(
  first: int, given: int, block: int, pixel_frames: Callable[[int], int], fps: float
) -> Callable[[int], float]:
  """block -> second at which it starts.

  first: number of the first new block, after `given` latent frames; block: latent frames of one.
  """

  def start(number: int) -> float:
    before = max(0, given + (number - first) * block)
    return pixel_frames(before) / fps if before else 0.0

  return start
