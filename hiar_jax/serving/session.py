"""A session: one client's generation, in a thread that writes a fragmented mp4, a few seconds ahead
of what the client has watched.
"""

from collections.abc import Callable
import dataclasses
import math
import pathlib
import threading
import time
import traceback
from typing import Any

from hiar_jax.errors import UserError
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import ConditioningFrames, StreamingModel
from hiar_jax.video.fragmented_mp4 import Fragment, FragmentedMP4

RECENT_PROMPTS = 8  # in a status; the client, seconds behind, collects them from several


@dataclasses.dataclass(frozen=True)
class Request:
  """A client's request for a video."""

  prompt: str
  seed: int = 0
  seconds: float | None = None  # of video; None: without end
  start: ConditioningFrames | None = None  # frames that it begins with


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a session, in seconds."""

  buffer_seconds: float = 2.0  # video made ahead of the viewer
  idle_timeout: float = 30.0  # a viewer may stand still for so long with video to watch
  grace: float = 60.0  # a paused or finished generation keeps its place while others wait
  max_seconds: float = 3600.0  # the longest video
  # between two pings; a tab that has not answered after half as long again is gone (aiohttp)
  heartbeat: float = 20.0


class Session:
  """A generation, its thread and its file. Methods return at once, except `change_prompt` and
  `close`, which wait for the tick at hand.

  changed: called from the thread whenever the status has changed. why: the reason for which the
  session ended, '' before that.
  """

  def __init__(
    self,
    source: StreamingModel,
    request: Request,
    path: pathlib.Path,
    limits: Limits,
    changed: Callable[[], None],
  ):
    self.source = source
    self.request = request
    self.path = path
    self.limits = limits
    self._changed = changed
    self.prompt = request.prompt
    self.mime = ""
    self.why = ""
    self.warnings: list[str] = []
    # Guards what follows: the event loop's threads and the session's own one both use it.
    self._condition = threading.Condition()
    self._stream: Stream | None = None  # None before it is open and after the end
    self._fragments: list[Fragment] = []
    self._frames_made = 0
    self._blocks = 0
    self._prompts: list[tuple[float, str]] = []  # (second from which it is shown, prompt)
    self._target = self._frames(request.seconds)  # frames; None: without end
    self._finished = False  # the target is reached
    self._paused = False
    self._ending = ""  # the reason for which the thread was asked to end
    self._watched = 0.0  # seconds of video
    # times of the monotonic clock
    self._requested_at = self._last_activity = time.monotonic()
    self._first_made_at = 0.0
    self._idle_since: float | None = None  # paused or finished since
    self._thread = threading.Thread(target=self._run, name=f"session {path.name}", daemon=True)
    self._thread.start()

  # ------------------------------------------------------------------------------ the client's side

  def change_prompt(self, prompt: str, recache: bool) -> int | None:
    """Changes the prompt; returns the number of the first block that has it, None where nothing is
    under way.

    Raises UserError where the generation cannot take it.
    """
    # not under the condition: this waits for a tick, and the event loop reads the status meanwhile
    with self._condition:
      stream = self._stream
    if stream is None or self.why:
      return None
    self.warnings = self.source.warnings(prompt)
    block = stream.change_prompt(prompt, recache)
    self.prompt = prompt
    self._changed()
    return block

  def pause(self, wanted: bool) -> None:
    """Pauses (True) or resumes (False) the generation."""
    with self._condition:
      self._paused = wanted
      self._last_activity = time.monotonic()
      self._idle_since = self._last_activity if wanted else None
      self._apply_pause()
      self._condition.notify_all()
    self._changed()

  def watched(self, seconds: float) -> None:
    """Notes up to which second the client has watched."""
    with self._condition:
      if seconds != self._watched:
        self._last_activity = time.monotonic()
      # a client may claim more than there is, which would lift the limit of `buffer_seconds`
      self._watched = min(seconds, self._frames_made / self.source.fps)
      self._condition.notify_all()

  def extend(self, seconds: float) -> None:
    """Extends the target length by `seconds`; has no effect on endless videos."""
    with self._condition:
      if self._target is not None:
        self._target += self._frames(seconds)
        self._last_activity = time.monotonic()
      self._condition.notify_all()

  def end(self, why: str) -> None:
    """Asks the thread to end; the first reason holds."""
    with self._condition:
      self._ending = self._ending or why
      self._apply_pause()
      self._condition.notify_all()

  def close(self, why: str = "closed") -> None:
    """Ends the session, and returns when all that it held is free."""
    self.end(why)
    self._thread.join()

  @property
  def is_over(self) -> bool:
    """True once the thread has ended and its device memory is free."""
    return bool(self.why) and not self._thread.is_alive()

  def idle_seconds(self) -> float:
    """Returns the seconds since it was paused or finished, 0 while it is running."""
    since = self._idle_since
    return time.monotonic() - since if since is not None else 0.0

  def content(self, first: int) -> list[tuple[int, int]]:
    """Returns the byte ranges (start, end) of the file's pieces from number `first` on.

    Piece 0 is the file's header, all before the first fragment; each fragment is a further one.
    """
    with self._condition:
      fragments = list(self._fragments)
    pieces = [(0, fragments[0].start)] if fragments else []
    return [*pieces, *((fragment.start, fragment.end) for fragment in fragments)][first:]

  def status(self) -> dict[str, Any]:
    """Returns the session's state as the page shows it (JSON)."""
    with self._condition:
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
        # the last sigma is 0: a block that reaches it has left the pipeline
        for i, sigma in enumerate(self.source.sigmas[:-1])
      ]
      state = "paused" if self._paused else "finished" if self._finished else "running"
      if not self._first_made_at:
        state = "starting"
      return {
        "state": "ended" if self.why else state,
        "why": self.why,
        "prompt": self.prompt,
        "prompts": self._prompts[-RECENT_PROMPTS:],
        "blocks": self._blocks,
        "frames": made,
        "seconds": made / self.source.fps,
        "fps": self.source.fps,
        "target": None if self._target is None else self._target / self.source.fps,
        "levels": levels,
        "remarks": self.warnings,
        "latency": self._first_made_at - self._requested_at if self._first_made_at else None,
        "speed": stream.speed if stream else None,
      }

  # ------------------------------------------------------------------------------------- the thread

  def _frames(self, seconds: float | None) -> int | None:
    # rounded up, but for the rounding error of seconds in decimals
    return None if seconds is None else max(1, math.ceil(seconds * self.source.fps - 1e-6))

  def _apply_pause(self) -> None:
    """Pauses or resumes the stream as the client asked."""
    # a session that is to end is resumed: its thread may be waiting for the stream's next block
    if self._stream:
      self._stream.pause(self._paused and not self._ending)

  def _run(self) -> None:
    """Makes the video until the session ends, and notes why it did."""
    why = ""
    source, request = self.source, self.request
    try:
      self.warnings = source.warnings(request.prompt)
      metadata = source.provenance(request.prompt, request.seed, request.start)
      # frames: endless, since the target may be extended; prefetch: a changed prompt is seen sooner
      stream = source.open(
        request.prompt, seed=request.seed, frames=None, start=request.start, prefetch=1
      )
      with stream, FragmentedMP4(self.path, source.fps, metadata, scale=source.scale) as file:
        with self._condition:
          self._stream = stream
          self._apply_pause()
        why = self._make(stream, file)
    except UserError as error:
      why = str(error)
    except BaseException as error:
      why = f"the generation failed ({type(error).__name__}: {error})"
      traceback.print_exc()  # a bug: the page says that it happened, the server's log where
    finally:
      with self._condition:
        self._stream, self.why = None, self._ending or why or "ended"
      self._changed()

  def _make(self, stream: Stream, file: FragmentedMP4) -> str:
    """Writes chunks into the file until the session is to end; returns the reason."""
    while not (why := self._wait(stream)):
      chunk = next(stream)
      fragment = file.write(chunk.frames)
      with self._condition:
        if not self._first_made_at:
          self._first_made_at = time.monotonic()
          self.mime = file.mime  # known from the first fragment on
        self._fragments.append(fragment)
        self._frames_made = file.frames
        self._blocks = chunk.block + 1
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
    """Waits until the next block is wanted; returns '' then, or the reason to end."""
    began = time.monotonic()
    with self._condition:
      while not self._ending:
        self._finished = self._target is not None and self._frames_made >= self._target
        idle = self._paused or self._finished
        ahead = self._frames_made / self.source.fps - self._watched
        if not idle and ahead < self.limits.buffer_seconds:
          break
        if idle and self._idle_since is None:
          self._idle_since = time.monotonic()
        # `began`: a client cannot watch what was not made yet, as while a block takes long
        since = max(self._last_activity, began)
        if not idle and time.monotonic() - since > self.limits.idle_timeout:
          return f"nobody watched for {self.limits.idle_timeout:g} seconds"
        self._condition.wait(timeout=0.5)  # seconds; nothing notifies when time has passed
      self._idle_since = None
      return self._ending
