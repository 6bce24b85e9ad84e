"""Errors that a person can act on: one clear line, no traceback."""


class UserError(Exception):
  """Bad input. The message says what was given, what was expected, and how to fix it.

  Entry points print it as one line and exit with status 2 (see `config.run`).
  Anything else that escapes is a bug and keeps its traceback.
  """


def at_least(least: float, **values: float) -> None:
  """Raises UserError for the first value below `least`, by its name."""
  for name, value in values.items():
    if value < least:
      raise UserError(f"{name} = {value}: expected at least {least}")
