"""A stop between two steps: a signal sets a flag that the loop polls after each step."""

import contextlib
import os
import signal
import stat
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

# What a scheduler (Slurm, submitit) or a terminal that is closed sends before the end.
LIKE_SIGTERM = (signal.SIGHUP, signal.SIGUSR1)


class Preemption:
  """A context in which SIGTERM, SIGHUP, SIGUSR1 and SIGINT request a stop after the current step.

  A second SIGINT aborts at once, with KeyboardInterrupt. SIGHUP is left alone where it is ignored
  (nohup).

      with Preemption() as stop:
        for step in ...:
          ...
          if stop.requested(step):
            checkpoints.save(step, ..., force=True)
            break

  In a job of several processes all must stop after the same step, or the others wait in a
  collective for ever. There JAX's preemption service watches SIGTERM and agrees on the step, and
  SIGHUP and SIGUSR1 are passed on as SIGTERM.
  """

  def __init__(self):
    self.signal: int | None = None  # the signal that requested the stop
    self._handlers: dict[int, object] = {}  # those replaced while the context is open

  def __enter__(self) -> "Preemption":
    # with several processes SIGTERM is the preemption service's
    watched = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else [signal.SIGINT]
    watched += [n for n in LIKE_SIGTERM if signal.getsignal(n) != signal.SIG_IGN]
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
    if number in LIKE_SIGTERM and jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    again = "; press Ctrl-C again to abort" if number == signal.SIGINT else ""
    # not print: a handler that interrupts a print may not enter it again
    said = f"\n{signal.Signals(number).name}: stopping after this step{again}\n".encode()
    try:
      os.write(sys.stderr.fileno(), said)
    except OSError:  # the terminal is gone, and all that is still to be said would raise as well
      _leave_the_terminal()


def _leave_the_terminal() -> None:
  """Sends what this process prints to nowhere, where it went to a terminal that was closed."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for file in (1, 2):
    with contextlib.suppress(OSError):  # closed
      if stat.S_ISCHR(os.fstat(file).st_mode):
        os.dup2(nowhere, file)
  os.close(nowhere)
