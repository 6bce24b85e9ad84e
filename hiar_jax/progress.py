"""A progress bar for every command, and which process may write."""

import sys
import time
from typing import Any

import jax
import tqdm


def is_writer() -> bool:
  """True on the one process of a job that writes logs and files."""
  return jax.process_index() == 0


def progress(stage: str, total: int, initial: int = 0) -> "Progress":
  """A progress bar from step `initial` to `total`.

  with progress("teacher", 2500, initial=step) as bar:
    bar.update(step + 1, loss=metrics["loss"])
  """
  return Progress(stage, total, initial)


class Progress:
  """A tqdm bar on a terminal; elsewhere (a log file, CI) a plain line every `seconds`, and one at
  the end.

  Both say the same: steps done, time spent, time left, speed, values. Goes to stderr, from process
  0 alone.
  """

  FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

  def __init__(self, stage: str, total: int, initial: int = 0, seconds: float = 20.0):
    self.stage, self.total, self.initial, self.step = stage, total, initial, initial
    self._seconds = seconds
    self._values: dict[str, Any] = {}
    self._started = time.monotonic()
    self._shown = (self._started, None)  # when a plain line was last printed, and at which step
    on_terminal = is_writer() and sys.stderr.isatty()
    self._bar = None
    if on_terminal:
      self._bar = tqdm.tqdm(
        desc=stage,
        total=total,
        initial=initial,
        unit="step",
        dynamic_ncols=True,
        file=sys.stderr,
        bar_format=self.FORMAT.replace("{n_fmt}", "{percentage:3.0f}%|{bar}| {n_fmt}"),
      )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def update(self, step: int, **values: Any) -> None:
    """Shows that `step` steps are done.

    Values (loss=...) are shown as they are drawn, so pass fetched numbers.
    """
    done, self.step = step - self.step, step
    self._values.update(values)
    if self._bar is not None:
      self._bar.set_postfix_str(self._postfix(), refresh=False)
      self._bar.update(done)
    elif time.monotonic() - self._shown[0] >= self._seconds:
      self._print()

  def close(self) -> None:
    """Draws the last state and ends the line. Closing again does nothing."""
    if self._bar is not None:
      self._bar.close()
    elif self.step > self.initial and self._shown[1] != self.step:
      self._print()

  def _postfix(self) -> str:
    return ", ".join(f"{name}={_show(value)}" for name, value in self._values.items())

  def _print(self) -> None:
    if not is_writer():
      return
    self._shown = (time.monotonic(), self.step)
    line = tqdm.tqdm.format_meter(
      n=self.step,
      total=self.total,
      elapsed=self._shown[0] - self._started,
      initial=self.initial,
      prefix=self.stage,
      unit="step",
      postfix=self._postfix(),
      bar_format=self.FORMAT,
    )
    print(line, file=sys.stderr, flush=True)


def _show(value: Any) -> str:
  return value if isinstance(value, str) else f"{float(value):.4g}"
