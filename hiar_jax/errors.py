"""Errors that a user can act on: one line, no traceback."""

from collections.abc import Callable, Iterable
import functools
import math
import re
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# a command to type, as it is, up to the end of its clause; or what makes a flag of a name
_FLAG = re.compile(r"(python -m [^;]*)|(?<![\w-])--(?=[a-z_]+\b)")

LONGEST = 2000  # letters of a message


class UserError(Exception):
  """Bad input; the message names what was given, what was expected, and a remedy.

  Entry points print it as one line and exit with status 2 (config.command_line.run). Any other
  exception that escapes is a bug and keeps its traceback. Of a message that quotes megabytes of
  what was given, the middle is left out.
  """

  def __init__(self, message: object = ""):
    text = str(message)
    if len(text) > LONGEST:
      left_out = len(text) - LONGEST
      text = f"{text[: LONGEST // 2]} ... ({left_out} letters) ... {text[-(LONGEST // 2) :]}"
    super().__init__(text)


class Damaged(UserError):
  """A stored thing that is lost, cut off, changed or unreadable.

  The message is '<what> is damaged (<reason>); <advice>'. Caught where an older copy can be read
  instead (training_state, training.loop.is_done).
  """

  def __init__(self, what: object, reason: object, advice: str):
    """what: the path; reason: a text, or the error, of which the first line is shown."""
    self.reason = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]
    super().__init__(f"{what} is damaged ({self.reason}); {advice}")


def without_flags(function: Callable[P, R]) -> Callable[P, R]:
  """For functions of Python whose options are a command's: what their errors call --prompt is
  `prompt`, but in commands that they say.
  """

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> R:
    try:
      return function(*args, **kwargs)
    except UserError as error:
      error.args = (_FLAG.sub(lambda found: found[1] or "", str(error)),)
      raise

  return call


MAX_SEED = 2**32 - 1  # of a random key: a larger one would be cut down to another's
MAX_NOISE_SEED = 2**31 - 1  # of a video: seeds become int32 on the device


def at_least(least: float, **values: float) -> None:
  """Raises UserError, with its name, for the first value below `least`, or not finite."""
  for name, value in values.items():
    if not least <= value < math.inf:
      finite = "" if math.isfinite(value) else ", finite"
      raise UserError(f"{name} = {value}: expected at least {least}{finite}")


def above(least: float, **values: float) -> None:
  """Raises UserError, with its name, for the first value not above `least`, or not finite."""
  for name, value in values.items():
    if not least < value < math.inf:
      finite = "" if math.isfinite(value) else ", finite"
      raise UserError(f"{name} = {value}: expected more than {least}{finite}")


def finite(**values: float) -> None:
  """Raises UserError, with its name, for the first value that is no finite number."""
  for name, value in values.items():
    if not math.isfinite(value):
      raise UserError(f"{name} = {value}: expected a finite number")


def within(low: float, high: float, **values: float) -> None:
  """Raises UserError, with its name, for the first value outside [low, high]."""
  for name, value in values.items():
    if not low <= value <= high:
      raise UserError(f"{name} = {value}: expected {low} to {high}")


def decay(**values: float) -> None:
  """Raises UserError, with its name, for the first value outside [0, 1)."""
  for name, value in values.items():
    if not 0 <= value < 1:
      raise UserError(f"{name} = {value}: expected at least 0 and less than 1")


def one_of(allowed: Iterable[str], **values: str) -> None:
  """Raises UserError, with its name, for the first value that is not in `allowed`."""
  for name, value in values.items():
    if value not in allowed:
      raise UserError(f"{name} = {value!r}: expected one of {', '.join(allowed)}")
