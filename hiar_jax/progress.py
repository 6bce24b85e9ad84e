"""The progress bar of all commands, and the choice of the process that writes."""

import contextlib
import sys
import time
from typing import Any

import jax
import tqdm


def is_writer() -> bool:
  """Returns True on the one process of a job that writes logs and files."""
  return jax.process_index() == 0


class Progress(contextlib.AbstractContextManager):
  """A tqdm bar on a terminal; elsewhere (a log file, CI) a line every `seconds` and at the end.

  Both show the steps done, time spent, time left, speed and values, on stderr of process 0:

      with Progress("teacher", 2500, initial=step) as bar:
        bar.update(step + 1, loss=metrics["loss"])
  """

  FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
  ENDLESS = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"

  def __init__(
    self,
    stage: str,
    total: int | None,
    initial: int = 0,
    seconds: float = 20.0,
    unit: str = "step",
  ):
    """total: the last step; None where there is none."""
    self.stage = stage
    self.total = total
    self.initial = initial
    self._unit = unit
    self._format = self.ENDLESS if total is None else self.FORMAT
    self.step = initial
    self._seconds = seconds
    self._values: dict[str, str] = {}
    self._started = time.monotonic()
    # of the last plain line: its time and its step
    self._printed_at: float = self._started
    self._printed_step: int | None = None
    # time and step of the first update, which compilation comes before
    self._first: tuple[float, int] | None = None
    self._bar = None
    if is_writer() and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        desc=stage,
        total=total,
        initial=initial,
        unit=unit,
        dynamic_ncols=True,
        file=sys.stderr,
        bar_format=self._format.replace("{n_fmt}/", "{percentage:3.0f}%|{bar}| {n_fmt}/"),
      )

  def __exit__(self, *exc) -> None:
    """Shows the last state and ends the line."""
    if self._bar is not None:
      self._bar.close()
    elif self.step > self.initial and self._printed_step != self.step:
      self._print()

  def wait_for(self, what: str) -> None:
    """Shows what the first step waits for, as minutes of compilation."""
    if self._bar is not None:
      self._bar.set_postfix_str(what)
    elif is_writer():
      print(f"{self.stage}: {what}", file=sys.stderr, flush=True)

  def update(self, step: int, **values: Any) -> None:
    """Shows that `step` steps are done.

    Values (loss=...) must be fetched numbers: a device array would be waited for here.
    """
    done = step - self.step
    self.step = step
    self._first = self._first or (time.monotonic(), step)
    for name, value in values.items():
      text = value if isinstance(value, str) else f"{float(value):.4g}"
      self._values[name] = f"{name}={text}"
    if self._bar is not None:
      self._bar.set_postfix_str(", ".join(self._values.values()), refresh=False)
      self._bar.update(done)
    elif time.monotonic() - self._printed_at >= self._seconds:
      self._print()

  def _print(self) -> None:
    if not is_writer():
      return
    self._printed_at = time.monotonic()
    self._printed_step = self.step
    first_at, first = self._first
    since = self._printed_at - first_at
    line = tqdm.tqdm.format_meter(
      n=self.step,
      total=self.total,
      elapsed=self._printed_at - self._started,
      initial=self.initial,
      # without what was compiled, where there is more to go by
      rate=(self.step - first) / since if self.step > first and since else None,
      prefix=self.stage,
      unit=self._unit,
      postfix=", ".join(self._values.values()),
      bar_format=self._format,
    )
    print(line, file=sys.stderr, flush=True)
