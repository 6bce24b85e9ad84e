"""How fast something is made while somebody works at it."""

import collections
import time


class ThroughputMeter:
  """Counts the seconds in which there was work, and the frames that came of it."""

  KEPT = 16  # chunks

  def __init__(self):
    self._seconds, self._since = 0.0, None
    self._notes: collections.deque[tuple[float, int]] = collections.deque(maxlen=self.KEPT)

  def run(self, wanted: bool) -> None:
    now = time.monotonic()
    if self._since is not None:
      self._seconds += now - self._since
    self._since = now if wanted else None

  def note(self, frames: int) -> None:
    """So many so far."""
    running = 0.0 if self._since is None else time.monotonic() - self._since
    self._notes.append((self._seconds + running, frames))

  def speed(self) -> float | None:
    if len(self._notes) < 2:
      return None
    (start, before), (end, after) = self._notes[0], self._notes[-1]
    return (after - before) / max(1e-9, end - start)
