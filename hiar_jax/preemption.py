"""Stopping between two steps: a signal sets a flag that the training loop polls."""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
  """While open, SIGTERM and SIGINT ask for a stop after the current step; a second SIGINT aborts at
  once.

      with Preemption() as stop:
        for step in ...:
          ...
          if stop.requested(step):
            checkpoints.save(step, ..., force=True)
            break

  In a job of several processes all must stop after the same step, so there JAX's preemption service
  watches SIGTERM and agrees on the step.
  """

  def __init__(self):
    self.signal: int | None = None  # the signal that asked for the stop
    self._before: dict[int, object] = {}

  def __enter__(self) -> "Preemption":
    watched = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else [signal.SIGINT]
    self._before = {number: signal.signal(number, self._on_signal) for number in watched}
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """True once a stop is wanted. Call it after every step, on every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and self.signal == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      raise KeyboardInterrupt
    self.signal = number
    again = "; press Ctrl-C again to abort" if number == signal.SIGINT else ""
    # os.write: a print interrupted in the middle of another print may not be entered again.
    os.write(
      sys.stderr.fileno(),
      f"\n{signal.Signals(number).name}: stopping after this step{again}\n".encode(),
    )
