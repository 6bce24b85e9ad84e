"""A meter of throughput: frames a second of working time."""

import collections
import time


class ThroughputMeter:
  """Counts the seconds in which there was work, and the frames that were made in them."""

  KEPT = 16  # measurements (one a chunk) that the speed is averaged over

  def __init__(self):
    self._seconds = 0.0  # of work, up to the last call of `run`
    self._since: float | None = None  # when the work under way began; None: idle
    # (working seconds, frames so far) after each chunk
    self._notes: collections.deque[tuple[float, int]] = collections.deque(maxlen=self.KEPT)

  def run(self, wanted: bool) -> None:
    """Starts (True) or stops (False) the clock; repeated calls are harmless."""
    now = time.monotonic()
    if self._since is not None:
      self._seconds += now - self._since
    self._since = now if wanted else None

  def note(self, frames: int) -> None:
    """Records the total number of frames made so far."""
    running = 0.0 if self._since is None else time.monotonic() - self._since
    self._notes.append((self._seconds + running, frames))

  def speed(self) -> float | None:
    """Returns frames a second over the last `KEPT` records, None before there are two."""
    if len(self._notes) < 2:
      return None
    (start, before), (end, after) = self._notes[0], self._notes[-1]
    return (after - before) / max(1e-9, end - start)  # the clock may not have moved between two
