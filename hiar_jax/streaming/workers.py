"""The two threads of a stream: one denoises blocks, one decodes them into chunks of frames."""

import collections
from collections.abc import Callable, Iterable
from concurrent.futures import Future
import dataclasses
import threading

import numpy as np

from hiar_jax.components.interfaces import BlockDecoder
from hiar_jax.generation.timeline import Change
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.throughput import ThroughputMeter
from hiar_jax.training import samples
from hiar_jax.types import Block, PyTree


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The frames of one block. Given frames come first, as a chunk of the block before the first."""

  frames: np.ndarray  # uint8 [n H W 3]
  block: int  # its number
  prompt: str
  time: float  # second at which its first frame is shown


class Workers:
  """The two threads, and all that they share with the stream's caller (producer.Stream, which has
  the methods that other threads call).

  The threads refer to this object and not to the Stream, so that a stream without references is
  collected, which ends them. Arguments: see producer.Stream.
  """

  def __init__(
    self,
    generation: LiveVideo,
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
    # Of the denoising thread, and of `Stream.save` while no tick runs. Others read `flight`, which
    # is replaced and never changed in place.
    self.changes = collections.deque(sorted(changes, key=lambda change: change.block))
    self.prompts = {block: prompt for _, block, prompt in generation.in_flight}
    self.flight: list[tuple[int, int, str]] = generation.in_flight
    # Everything below changes under the condition alone, and whoever waits for it is notified.
    self.condition = threading.Condition()
    self.blocks_wanted = blocks
    self.made = 0  # blocks that have left the pipeline
    self.frames = 0  # decoded so far
    self.memory: PyTree = None  # the decoder's
    # (number, prompt, latents [1 k h w c]) of finished blocks that wait for the decoder
    self.blocks: collections.deque[tuple[int, str, Block]] = collections.deque()
    self.chunks: collections.deque[Chunk] = collections.deque()
    # (prompt, recache, where the number of its first block goes) of changes that callers ask for
    self.calls: collections.deque[tuple[str, bool, Future]] = collections.deque()
    self.closed = False
    self.paused = False
    self.saving = False
    self.ticking = False
    self.decoding = False
    self.error: BaseException | None = None
    self.meter = ThroughputMeter()
    if given is not None:
      self.blocks.append((generation.next_block - 1, generation.prompt, given))
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
    """Repeats a thread's step until it returns False; an error is raised by Stream instead."""
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
    for _, _, result in self.calls:
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

  def has_enough(self) -> bool:
    """Tells whether all blocks that are wanted have left the pipeline."""
    return self.blocks_wanted is not None and self.made >= self.blocks_wanted

  def _denoise(self) -> bool:
    """Waits for room, then runs one tick, or one change of prompt; returns False once closed."""
    with self.condition:
      self.condition.wait_for(
        lambda: (
          self.closed
          or self.calls
          or not (
            self.paused or self.saving or self.has_enough() or len(self.blocks) >= self.prefetch
          )
        )
      )
      if self.closed:
        return False
      generation = self.generation
      call = self.calls.popleft() if self.calls else None
      self._set_busy(ticking=True)
    # without the condition: a tick may take seconds, and the caller takes chunks meanwhile
    try:
      if call:
        _change_prompt(generation, *call)
      else:
        self._tick(generation)
    finally:
      with self.condition:
        self._set_busy(ticking=False)
        self.condition.notify_all()
    return True

  def _tick(self, generation: LiveVideo) -> None:
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
        self.blocks.append((emitted.block, prompt, emitted.latents))
        self.made += 1

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
      number, prompt, latents = self.blocks.popleft()
      decoder, memory = self.decoder, self.memory
      self._set_busy(decoding=True)
      self.condition.notify_all()
    samples.check_finite(latents, f"block {number}, {prompt!r}")
    frames, memory = decoder(latents, memory)
    with self.condition:
      if not self.closed:
        self.chunks.append(Chunk(frames, number, prompt, self.frames / self.fps))
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


def _change_prompt(generation: LiveVideo, prompt: str, recache: bool, result: Future) -> None:
  """Changes the prompt; an error goes to whoever waits for the result and does not end the
  thread.
  """
  if not result.set_running_or_notify_cancel():
    return
  try:
    result.set_result(generation.change_prompt(prompt, recache))
  except BaseException as error:
    result.set_exception(error)
