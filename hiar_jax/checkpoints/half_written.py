"""What a checkpoint leaves on a full disk: half-written folders are removed, and the tracebacks of
the threads that wrote them are hidden; training_state reports it in one line.
"""

import logging
import pathlib
import shutil
import sys
import time

from hiar_jax.files import is_disk_full

TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax adds to a step's name until it is complete
_removed: set[str] = set()  # such folders, in which nothing can be written any more


def remove(directory: pathlib.Path, step: int) -> bool:
  """Returns True where there was something of the step."""
  found = list(directory.glob(f"{step}{TEMPORARY}*"))
  for path in found:
    _removed.add(str(path))
    shutil.rmtree(path, ignore_errors=True)
  return bool(found)


def remove_late(directory: pathlib.Path, step: int) -> None:
  """Removes what there is of the step until nothing comes any more, for 10 s at most: writes of
  TensorStore end on their own after another one has failed, and make the folder anew.
  """
  quiet = 0
  for _ in range(200):
    quiet = 0 if remove(directory, step) else quiet + 1
    if quiet == 3:
      return
    time.sleep(0.05)


def found_removed(error: BaseException) -> bool:
  """Returns True for an error of a write whose folder `remove` took away."""
  return any(path in str(error) for path in _removed)


def hide_tracebacks() -> None:
  """Hides the tracebacks of a full disk, which training_state reports in one line, and of threads
  that find removed what was half written.

  Orbax raises the first failure and closes the event loop to which the other writes report. Of
  those asyncio logs that nobody has asked for them, or, as their threads can raise nothing, Python
  prints a traceback for each.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_shown)  # once, however often it is added
  shown = sys.unraisablehook
  if getattr(shown, "hides_late_writes", False):
    return

  def hook(unraisable) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      shown(unraisable)

  hook.hides_late_writes = True
  sys.unraisablehook = hook


def _is_shown(record: logging.LogRecord) -> bool:
  error = record.exc_info and record.exc_info[1]
  return not (error and (is_disk_full(error) or found_removed(error)))
