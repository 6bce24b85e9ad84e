"""The two threads of a stream: one denoises blocks, one decodes them into chunks of frames."""

import collections
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
import dataclasses
import json
import os
import threading
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.components.interfaces import BlockDecoder
from hiar_jax.errors import UserError
from hiar_jax.streaming.throughput import ThroughputMeter
from hiar_jax.streaming.timeline import Change
from hiar_jax.types import PyTree


class BlockSource(Protocol):
  """The interface of streaming.live_video.LiveVideo that a stream uses, from one thread."""

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
  """The frames of one block. Given frames come first, as a chunk of the block before the first."""

  frames: np.ndarray  # uint8 [n H W 3]
  block: int  # its number
  prompt: str
  time: float  # second at which its first frame is shown


@dataclasses.dataclass(frozen=True)
class LatentBlock:
  """A finished block that waits for the decoder."""

  number: int
  prompt: str
  latents: Any  # [1 k h w c]


class Workers:
  """The two threads and all that they share with the stream's caller.

  The threads refer to this object and not to the Stream, so that a stream without references is
  collected, which ends them. Arguments: see producer.Stream.
  """

  def __init__(
    self,
    generation: BlockSource,
    decoder: BlockDecoder,
    fps: float,
    blocks: int | None,
    changes: Iterable[Change],
    given: np.ndarray | None,
    prefetch: int,
  ):
    self.generation = generation
    self.decoder = decoder
    self.fps = fps
    self.prefetch = prefetch
    # Of the denoising thread, and of `save` while no tick runs. Others read `flight`, which is
    # replaced and never changed in place.
    self.changes = collections.deque(sorted(changes, key=lambda change: change.block))
    self.prompts = {block: prompt for _, block, prompt in generation.in_flight}
    self.flight: list[tuple[int, int, str]] = generation.in_flight
    # Everything below changes under the condition alone, and whoever waits for it is notified.
    self.condition = threading.Condition()
    self.blocks_wanted = blocks
    self.made = 0  # blocks that have left the pipeline
    self.frames = 0  # decoded so far
    self.memory: PyTree = None  # the decoder's
    self.blocks: collections.deque[LatentBlock] = collections.deque()
    self.chunks: collections.deque[Chunk] = collections.deque()
    self.calls: collections.deque[tuple[Callable, Future]] = collections.deque()
    self.closed = False
    self.paused = False
    self.saving = False
    self.ticking = False
    self.decoding = False
    self.error: BaseException | None = None
    self.meter = ThroughputMeter()
    if given is not None:
      self.blocks.append(LatentBlock(generation.next_block - 1, generation.prompt, given))
    self.threads: list[threading.Thread] = []

  def begin(self) -> None:
    """Starts the threads."""
    # daemons: an interpreter that exits does not wait for a stream that was left open
    self.threads = [
      threading.Thread(target=self._run, args=(step,), name=step.__name__, daemon=True)
      for step in (self._denoise, self._decode)
    ]
    for thread in self.threads:
      thread.start()

  def _run(self, step: Callable[[], bool]) -> None:
    """Repeats a thread's step until it returns False; an error is raised in `take` instead."""
    try:
      while step():
        pass
    except BaseException as error:
      with self.condition:
        self.error = self.error or error  # the first one is the cause
        # after an error of the denoising thread, blocks that are finished are still decoded
        self._release(decoder_too=step == self._decode)

  def _release(self, decoder_too: bool = True) -> None:
    """Cancels waiting calls and drops the generation, so that its device memory is freed."""
    for _, result in self.calls:
      result.cancel()
    self.calls.clear()
    self.generation = None
    if decoder_too:
      self.closed = True
      self.decoder = None
      self.memory = None
    self.condition.notify_all()

  def close(self) -> None:
    """Ends both threads and drops all that they held; returns after the step at hand."""
    with self.condition:
      self._release()
      self.blocks.clear()
      self.chunks.clear()
    for thread in self.threads:
      # a garbage collection, and so this call, may happen in any thread: none can join itself
      if thread is not threading.current_thread():
        thread.join()

  # -------------------------------------------------------------------------------------- denoising

  def _denoise(self) -> bool:
    """Waits for room, then runs one tick, or one call of `call`; returns False once closed."""
    with self.condition:
      self.condition.wait_for(lambda: self.closed or self.calls or self._may_tick())
      if self.closed:
        return False
      generation = self.generation
      call = self.calls.popleft() if self.calls else None
      self._set_busy(ticking=True)
    # without the condition: a tick may take seconds, and the caller takes chunks meanwhile
    try:
      if call:
        _execute(*call, generation)
      else:
        self._tick(generation)
    finally:
      with self.condition:
        self._set_busy(ticking=False)
        self.condition.notify_all()
    return True

  def _may_tick(self) -> bool:
    if self.paused or self.saving or self._has_enough():
      return False
    return len(self.blocks) < self.prefetch

  def _has_enough(self) -> bool:
    return self.blocks_wanted is not None and self.made >= self.blocks_wanted

  def _tick(self, generation: BlockSource) -> None:
    entering = generation.next_block
    while self.changes and self.changes[0].block <= entering:
      change = self.changes.popleft()
      if change.recache or change.prompt != generation.prompt:
        generation.change_prompt(change.prompt, change.recache)
    self.prompts[entering] = generation.prompt
    emitted = generation.step()
    flight = generation.in_flight
    with self.condition:
      self.flight = flight
      if emitted is not None and not self.closed:
        prompt = self.prompts.pop(emitted.block)
        self.prompts = {
          block: prompt for block, prompt in self.prompts.items() if block > emitted.block
        }
        self.blocks.append(LatentBlock(emitted.block, prompt, emitted.latents))
        self.made += 1

  # --------------------------------------------------------------------------------------- decoding

  def _decode(self) -> bool:
    """Waits for a block and room, then decodes it; returns False at the end."""
    with self.condition:
      # while saving, chunks may exceed `prefetch`: all that has left the pipeline is decoded
      self.condition.wait_for(
        lambda: (
          self.closed
          or (self.blocks and (self.saving or len(self.chunks) < self.prefetch))
          or (self.error and not self.blocks)
        )
      )
      if self.closed or not self.blocks:
        return False
      block = self.blocks.popleft()
      decoder, memory = self.decoder, self.memory
      self._set_busy(decoding=True)
      self.condition.notify_all()
    frames, memory = decoder(block.latents, memory)
    with self.condition:
      if not self.closed:
        self.chunks.append(Chunk(frames, block.number, block.prompt, self.frames / self.fps))
        self.frames += len(frames)
        self.memory = memory
        self._set_busy(decoding=False)
        self.meter.note(self.frames)
      self.condition.notify_all()
    return True

  def _set_busy(self, ticking: bool | None = None, decoding: bool | None = None) -> None:
    """Notes which threads work (None: as before); the meter runs while any does."""
    if ticking is not None:
      self.ticking = ticking
    if decoding is not None:
      self.decoding = decoding
    self.meter.run(self.ticking or self.decoding)

  # ------------------------------------------------------------------------ called by other threads

  def take(self) -> Chunk:
    """Waits for the next chunk. Raises StopIteration at the end, or the error of a thread."""
    with self.condition:
      self.condition.wait_for(lambda: self.closed or self.chunks or self._at_end())
      if not self.chunks:  # chunks that were finished before an error come first
        self._raise_error()
        raise StopIteration
      self.condition.notify_all()
      return self.chunks.popleft()

  def _at_end(self) -> bool:
    if self.error is None and not self._has_enough():
      return False
    return not (self.blocks or self.decoding or self.ticking)

  def _raise_error(self) -> None:
    if self.error:
      raise self.error

  def _check_open(self) -> None:
    self._raise_error()
    if self.closed:
      raise UserError("this stream is closed; open another one")

  def call(self, function: Callable) -> Any:
    """Returns function(generation), run in the denoising thread between two ticks."""
    result: Future = Future()
    with self.condition:
      self._check_open()
      self.calls.append((function, result))
      self.condition.notify_all()
    try:
      return result.result()
    except CancelledError:
      self._check_open()  # says why: an error, or the stream was closed
      raise

  def extend(self, blocks: int) -> None:
    """Extends the target length; no effect on an endless stream."""
    with self.condition:
      if self.blocks_wanted is not None:
        self.blocks_wanted += blocks
      self.condition.notify_all()

  def pause(self, wanted: bool) -> None:
    """Stops (True) or resumes (False) ticks; blocks that are finished are still decoded."""
    with self.condition:
      self.paused = wanted
      self.condition.notify_all()

  def speed(self) -> float | None:
    """Returns frames a second of working time, None before there are two chunks."""
    with self.condition:
      return self.meter.speed()

  def taken(self) -> int:
    """Returns the frames of the chunks that were taken."""
    with self.condition:
      return self.frames - sum(len(chunk.frames) for chunk in self.chunks)

  def save(self, directory: str | os.PathLike) -> None:
    """Saves the generation and `_state`, once all that has left the pipeline is decoded.

    No tick begins meanwhile, so both are of the same moment.
    """
    with self.condition:
      self._check_open()
      self.saving = True
      self.condition.notify_all()
      try:
        self.condition.wait_for(
          lambda: self.closed or self.error or not (self.ticking or self.blocks or self.decoding)
        )
        self._check_open()
        self.generation.decoder = self._state()
        self.generation.save(directory)
      finally:
        self.saving = False
        self.condition.notify_all()

  def _state(self) -> list[np.ndarray | jax.Array]:
    """Returns [metadata, frames of each chunk not yet taken, leaves of the decoder's memory]."""
    chunks = [[chunk.block, chunk.prompt, chunk.time] for chunk in self.chunks]
    changes = [[change.block, change.prompt, change.recache] for change in self.changes]
    metadata = {"frames": self.frames, "made": self.made, "chunks": chunks, "changes": changes}
    return [
      # JSON as bytes: a generation saves its decoder's state as arrays alone
      np.frombuffer(json.dumps(metadata).encode(), np.uint8),
      *(chunk.frames for chunk in self.chunks),
      *jax.tree.leaves(self.memory),
    ]


def _execute(function: Callable, result: Future, generation: BlockSource) -> None:
  """Runs a call; its error goes to whoever waits for the result and does not end the thread."""
  if not result.set_running_or_notify_cancel():
    return
  try:
    result.set_result(function(generation))
  except BaseException as error:
    result.set_exception(error)
