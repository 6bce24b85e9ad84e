"""One client's generation: a thread that makes it into a growing file, no further ahead of the
client than is good for either.
"""

from collections.abc import Callable
import dataclasses
import math
import pathlib
import threading
import time
import traceback
from typing import Any, Protocol

from hiar_jax.errors import UserError
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import ConditioningFrames
from hiar_jax.video.fragmented_mp4 import Fragment, FragmentedMP4

RECENT_PROMPTS = 8  # of the last ones: a client is seconds behind


class StreamSource(Protocol):
  """What the page needs of streaming.source.Source."""

  fps: float
  scale: int
  sigmas: tuple[float, ...]

  def open(
    self,
    prompt: str,
    *,
    seed: int,
    frames: int | None,
    start: ConditioningFrames | None,
    prefetch: int,
  ) -> Stream: ...
  def read_start(
    self, path: pathlib.Path, kind: str, name: str
  ) -> tuple[ConditioningFrames, str]: ...
  def remarks(self, prompt: str) -> list[str]: ...
  def provenance(
    self, prompt: str, seed: int, start: ConditioningFrames | None
  ) -> dict[str, str]: ...


@dataclasses.dataclass(frozen=True)
class Request:
  """What a client asks for. seconds: of video, None: without end. start: what it begins with."""

  prompt: str
  seed: int = 0
  seconds: float | None = None
  start: ConditioningFrames | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
  """buffer_seconds: of video that may be made ahead of the viewer.
  idle_timeout: seconds that a viewer may stand still with video to watch.
  grace: seconds that a paused or finished generation keeps its place when others wait.
  max_seconds: of one video.
  heartbeat: seconds between two questions whether the tab is still there; one that has not answered
  after half as many more is gone.
  """

  buffer_seconds: float = 2.0
  idle_timeout: float = 30.0
  grace: float = 60.0
  max_seconds: float = 3600.0
  heartbeat: float = 20.0


class Session:
  """See the module's docstring. Its methods return at once, but for `change_prompt` and `close`,
  which wait for the tick at hand.

  changed: called from the thread whenever there is something new to tell. why: for what reason it
  ended, '' while it has not.
  """

  def __init__(
    self,
    source: StreamSource,
    request: Request,
    path: pathlib.Path,
    limits: Limits,
    changed: Callable[[], None],
  ):
    self.source, self.request, self.path, self.limits, self._changed = (
      source,
      request,
      path,
      limits,
      changed,
    )
    self.prompt, self.mime, self.why = request.prompt, "", ""
    self.remarks: list[str] = []
    self._turn = threading.Condition()
    self._fragments: list[Fragment] = []
    self._stream: Stream | None = None
    self._head, self._moved, self._paused, self._ending = 0.0, time.monotonic(), False, ""
    self._target = self._frames(request.seconds)
    self._finished = False
    self._frames_made = self._blocks = 0
    self._prompts: list[tuple[float, str]] = []  # from which second on
    self._asked, self._first, self._idle_since = time.monotonic(), 0.0, None
    self._thread = threading.Thread(target=self._run, name=f"session {path.name}", daemon=True)

  def start(self) -> None:
    self._thread.start()

  # ------------------------------------------------------------------------------ the client's side

  def change_prompt(self, prompt: str, recache: bool) -> int | None:
    """The first block that shows it; None where it is not under way.

    Raises UserError where the generation cannot take it.
    """
    with self._turn:
      stream = self._stream
    if stream is None or self.why:
      return None
    self.remarks = self.source.remarks(prompt)
    block = stream.change_prompt(prompt, recache)
    self.prompt = prompt
    self._changed()
    return block

  def pause(self, wanted: bool) -> None:
    with self._turn:
      self._paused, self._moved = wanted, time.monotonic()
      self._idle_since = self._moved if wanted else None
      self._hold()
      self._turn.notify_all()
    self._changed()

  def watched(self, seconds: float) -> None:
    """The client has seen so much of the video."""
    with self._turn:
      if seconds != self._head:
        self._moved = time.monotonic()
      self._head = min(seconds, self._frames_made / self.source.fps)
      self._turn.notify_all()

  def extend(self, seconds: float) -> None:
    """Extends the target length by `seconds`; has no effect on endless videos."""
    with self._turn:
      if self._target is not None:
        self._target += self._frames(seconds)
        self._moved = time.monotonic()
      self._turn.notify_all()

  def end(self, why: str) -> None:
    """Asks the thread to end."""
    with self._turn:
      self._ending = self._ending or why
      self._hold()
      self._turn.notify_all()

  def close(self, why: str = "closed") -> None:
    """Ends it, and returns when all that it held is free."""
    self.end(why)
    if self._thread.ident:
      self._thread.join()

  @property
  def is_over(self) -> bool:
    return bool(self.why) and not self._thread.is_alive()

  def idle_seconds(self) -> float:
    """How long it has been paused or finished."""
    since = self._idle_since
    return time.monotonic() - since if since is not None else 0.0

  def content(self, first: int) -> list[tuple[int, int]]:
    """(start, end) in the file of what can be sent after `first` pieces of it: the head is one,
    then each fragment.
    """
    with self._turn:
      fragments = list(self._fragments)
    pieces = [(0, fragments[0].start)] if fragments else []
    return [*pieces, *((fragment.start, fragment.end) for fragment in fragments)][first:]

  def status(self) -> dict[str, Any]:
    """For the page."""
    with self._turn:
      stream, made = self._stream, self._frames_made
      flight = {
        level: (block, prompt) for level, block, prompt in (stream.in_flight if stream else [])
      }
      levels = [
        {
          "sigma": round(float(sigma), 3),
          "block": flight[i][0] if i in flight else None,
          "prompt": flight[i][1] if i in flight else None,
        }
        for i, sigma in enumerate(self.source.sigmas[:-1])
      ]
      return {
        "state": self._state(),
        "why": self.why,
        "prompt": self.prompt,
        "prompts": self._prompts[-RECENT_PROMPTS:],
        "blocks": self._blocks,
        "frames": made,
        "seconds": made / self.source.fps,
        "fps": self.source.fps,
        "target": None if self._target is None else self._target / self.source.fps,
        "levels": levels,
        "remarks": self.remarks,
        "latency": self._first - self._asked if self._first else None,
        "speed": stream.speed if stream else None,
      }

  # ------------------------------------------------------------------------------------- the thread

  def _frames(self, seconds: float | None) -> int | None:
    return None if seconds is None else max(1, math.ceil(seconds * self.source.fps - 1e-6))

  def _state(self) -> str:
    if self.why:
      return "ended"
    if not self._first:
      return "starting"
    return "paused" if self._paused else "finished" if self._finished else "running"

  def _hold(self) -> None:
    """Pauses or resumes the stream as the viewer asked. One that is to end is resumed, since the
    thread may be waiting for its next block.
    """
    if self._stream:
      self._stream.pause(self._paused and not self._ending)

  def _run(self) -> None:
    why = ""
    try:
      self.remarks = self.source.remarks(self.request.prompt)
      told = self.source.provenance(self.request.prompt, self.request.seed, self.request.start)
      stream = self.source.open(
        self.request.prompt,
        seed=self.request.seed,
        frames=None,
        start=self.request.start,
        prefetch=1,
      )
      with stream, FragmentedMP4(self.path, self.source.fps, told, scale=self.source.scale) as file:
        with self._turn:
          self._stream = stream
          self._hold()
        why = self._make(stream, file)
    except UserError as error:
      why = str(error)
    except BaseException as error:
      why = f"the generation failed ({type(error).__name__}: {error})"
      traceback.print_exc()  # a bug: the page says that it happened, the server's log where
    finally:
      with self._turn:
        self._stream, self.why = None, self._ending or why or "ended"
      self._changed()

  def _make(self, stream: Stream, file: FragmentedMP4) -> str:
    """Until somebody ends it; why it ended."""
    while not (why := self._wait(stream)):
      chunk = next(stream)
      fragment = file.write(chunk.frames)
      with self._turn:
        if not self._first:
          self._first, self.mime = time.monotonic(), file.mime
        self._fragments.append(fragment)
        self._frames_made, self._blocks = file.frames, chunk.block + 1
        if not self._prompts or self._prompts[-1][1] != chunk.prompt:
          self._prompts.append((chunk.time, chunk.prompt))
        self._finished = self._target is not None and file.frames >= self._target
      self._changed()
      if file.frames >= self.limits.max_seconds * self.source.fps:
        return (
          f"a video is at most {self.limits.max_seconds:g} seconds long; download it and start "
          "another one"
        )
    return why

  def _wait(self, stream: Stream) -> str:
    """Until the next block is wanted: '' for go on, else why not."""
    began = time.monotonic()
    with self._turn:
      while not (self._ending or self._wants_more()):
        idle = self._paused or self._finished
        if idle and self._idle_since is None:
          self._idle_since = time.monotonic()
        if not idle and time.monotonic() - max(self._moved, began) > self.limits.idle_timeout:
          return f"nobody watched for {self.limits.idle_timeout:g} seconds"
        self._turn.wait(timeout=0.5)
      self._idle_since = None
      return self._ending

  def _wants_more(self) -> bool:
    self._finished = self._target is not None and self._frames_made >= self._target
    behind = self._frames_made / self.source.fps - self._head < self.limits.buffer_seconds
    return behind and not self._paused and not self._finished
