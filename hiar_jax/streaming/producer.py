"""A stream: video that is taken while it is made. One thread denoises, another decodes, the caller
takes chunks of frames; the queues between them are bounded.

    with Stream(generation, decoder, fps=16) as stream:
      for chunk in stream:
        show(chunk.frames)
        if bored:
          stream.change_prompt("a blue square moving up")

A caller that takes nothing holds both threads up. Closing the stream, or dropping the last
reference to it, ends them.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
import json
import numbers
import os
import weakref

import jax
import numpy as np

from hiar_jax.components.interfaces import BlockDecoder
from hiar_jax.errors import UserError, at_least
from hiar_jax.generation.timeline import Change
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.workers import Chunk, Workers
from hiar_jax.types import PyTree


class Stream:
  """An iterator of chunks (see the module docstring), with methods for any thread."""

  def __init__(
    self,
    generation: LiveVideo,
    decoder: BlockDecoder,
    *,
    fps: float,
    blocks: int | None = None,
    changes: Iterable[Change] = (),
    given: np.ndarray | None = None,
    prefetch: int = 2,
    saved: tuple[int, int, Sequence[Chunk], PyTree] = (0, 0, (), None),
  ):
    """Starts the threads.

    blocks: how many to make, those of a saved stream included; None: without end. After them the
    iterator ends; `extend` lets it continue.
    changes: prompts by the block at which they enter.
    given: latents [1 f h w c] that the generation was started from, decoded first.
    prefetch: blocks that may wait for the decoder, and chunks that may wait for the caller.
    saved: of a resumed stream (see `resume`), its frames decoded so far, blocks made, chunks not
    yet taken, and the decoder's memory.
    """
    at_least(1, prefetch=prefetch)
    self.fps = fps
    # as they were when the stream began or was resumed
    self.prompt = generation.prompt
    self.seed = generation.seed
    self._work = work = Workers(generation, decoder, fps, blocks, changes, given, prefetch)
    work.frames, work.made, chunks, work.memory = saved
    work.chunks.extend(chunks)
    # The finalizer must not refer to self, or the stream would never be collected.
    self._end = weakref.finalize(self, work.close)
    work.begin()

  @classmethod
  def resume(
    cls, generation: LiveVideo, decoder: BlockDecoder, latents: tuple[int, ...], **options
  ) -> "Stream":
    """Resumes a generation that Stream.save wrote, right after the last chunk that was taken.

    latents: the shape [1 k h w c] of a block. Raises UserError where the generation was not saved
    by a stream.
    """
    state, generation.decoder = generation.decoder, None
    if state is None:
      raise UserError(
        "this generation was saved without what its decoder remembers; give one that a stream saved"
      )
    # as `save` wrote it: metadata, frames of each chunk, leaves of the decoder's memory
    metadata = json.loads(bytes(np.asarray(state[0])))
    end = 1 + len(metadata["chunks"])
    frames, leaves = state[1:end], state[end:]
    chunks = [
      Chunk(np.asarray(pixels), *fields)
      for pixels, fields in zip(frames, metadata["chunks"], strict=True)
    ]
    options.setdefault("changes", [Change(*fields) for fields in metadata["changes"]])
    memory = decoder.remember(leaves, latents)
    saved = metadata["frames"], metadata["made"], chunks, memory
    return cls(generation, decoder, **options, saved=saved)

  def __iter__(self) -> Iterator[Chunk]:
    return self

  def __next__(self) -> Chunk:
    """Waits for the next chunk. Raises the error of a thread after the chunks made before it."""
    work = self._work
    with work.condition:
      work.condition.wait_for(
        lambda: (
          work.closed
          or work.chunks
          or (
            (work.error or work.has_enough()) and not (work.blocks or work.decoding or work.ticking)
          )
        )
      )
      if work.chunks:
        work.condition.notify_all()
        return work.chunks.popleft()
      if work.error:
        raise work.error
      raise StopIteration

  def _check_open(self) -> None:
    """Raises the error of a thread, or UserError for a stream that is closed."""
    if self._work.error:
      raise self._work.error
    if self._work.closed:
      raise UserError("this stream is closed; open another one")

  def change_prompt(self, prompt: str, recache: bool = False) -> int:
    """Sets the prompt of the blocks that enter from now on; returns the number of the first.

    recache: as LiveVideo.change_prompt. Raises UserError for a prompt that is no text.
    """
    if not isinstance(prompt, str):
      raise UserError(f"prompt = {prompt!r}: expected text")
    result: Future = Future()
    with self._work.condition:
      self._check_open()
      # the denoising thread does it between two ticks
      self._work.calls.append((prompt, recache, result))
      self._work.condition.notify_all()
    try:
      return result.result()
    except CancelledError:
      self._check_open()  # says why: an error, or the stream was closed
      raise

  def extend(self, blocks: int) -> None:
    """Extends the number of blocks to make; no effect on an endless stream. Raises UserError for no
    whole number, or less than 0.
    """
    if not isinstance(blocks, numbers.Integral) or isinstance(blocks, bool) or blocks < 0:
      raise UserError(f"blocks = {blocks!r}: expected a whole number, at least 0")
    with self._work.condition:
      if self._work.blocks_wanted is not None:
        self._work.blocks_wanted += blocks
      self._work.condition.notify_all()

  def pause(self, wanted: bool = True) -> None:
    """Begins no further block until pause(False); blocks that are finished are still decoded."""
    with self._work.condition:
      self._work.paused = wanted
      self._work.condition.notify_all()

  def save(self, directory: str | os.PathLike) -> None:
    """Writes a snapshot, atomically, to resume from after the last chunk that was taken.

    The stream continues. Raises UserError where the disk is full or the stream is closed.
    """
    work = self._work
    with work.condition:
      self._check_open()
      work.saving = True
      work.condition.notify_all()
      try:
        # No tick begins meanwhile, and all that has left the pipeline is decoded: the generation,
        # the chunks and the decoder's memory are of the same moment.
        work.condition.wait_for(
          lambda: work.closed or work.error or not (work.ticking or work.blocks or work.decoding)
        )
        self._check_open()
        metadata = {
          "frames": work.frames,
          "made": work.made,
          "chunks": [[chunk.block, chunk.prompt, chunk.time] for chunk in work.chunks],
          "changes": [[change.block, change.prompt, change.recache] for change in work.changes],
        }
        work.generation.decoder = [
          # JSON as bytes: a generation saves its decoder's state as arrays alone
          np.frombuffer(json.dumps(metadata).encode(), np.uint8),
          *(chunk.frames for chunk in work.chunks),
          *jax.tree.leaves(work.memory),
        ]
        work.generation.save(directory)
      finally:
        work.saving = False
        work.condition.notify_all()

  @property
  def in_flight(self) -> list[tuple[int, int, str]]:
    """(level, block, prompt) of the blocks that are being denoised, as of the last tick."""
    return self._work.flight

  @property
  def taken(self) -> int:
    """Frames of the chunks that were taken."""
    with self._work.condition:
      return self._work.frames - sum(len(chunk.frames) for chunk in self._work.chunks)

  @property
  def made(self) -> int:
    """Blocks that have left the pipeline."""
    return self._work.made

  @property
  def speed(self) -> float | None:
    """Frames a second of working time, over the last chunks; None before there are two."""
    with self._work.condition:
      return self._work.meter.speed()

  def close(self) -> None:
    """Ends both threads, at most one block later, and frees all that they held.

    Chunks that were not taken are lost.
    """
    self._end()

  def __enter__(self) -> "Stream":
    return self

  def __exit__(self, *exc) -> None:
    self.close()
