"""A stop between two steps: a signal sets a flag that the loop polls after each step."""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
  """A context in which SIGTERM and SIGINT request a stop after the current step.

  A second SIGINT aborts at once, with KeyboardInterrupt.

      with Preemption() as stop:
        for step in ...:
          ...
          if stop.requested(step):
            checkpoints.save(step, ..., force=True)
            break

  In a job of several processes all must stop after the same step, or the others wait in a
  collective for ever. There JAX's preemption service watches SIGTERM and agrees on the step.
  """

  def __init__(self):
    self.signal: int | None = None  # the signal that requested the stop
    self._handlers: dict[int, object] = {}  # those replaced while the context is open

  def __enter__(self) -> "Preemption":
    # with several processes SIGTERM is the preemption service's
    watched = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else [signal.SIGINT]
    self._handlers = {number: signal.signal(number, self._on_signal) for number in watched}
    return self

  def __exit__(self, *exc) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def requested(self, step: int) -> bool:
    """Returns True once a stop is requested; to be called after every step, on every process."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and self.signal == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      raise KeyboardInterrupt
    self.signal = number
    again = "; press Ctrl-C again to abort" if number == signal.SIGINT else ""
    # not print: a handler that interrupts a print may not enter it again
    os.write(
      sys.stderr.fileno(),
      f"\n{signal.Signals(number).name}: stopping after this step{again}\n".encode(),
    )
