"""Lists that people write, of prompts and of captions: the rows of a .jsonl or .csv file, each with
its line.
"""

from collections.abc import Iterator
import csv
import dataclasses
import io
import json
import pathlib
from typing import Any

from hiar_jax.errors import UserError
from hiar_jax.files import is_whole, read_text


@dataclasses.dataclass(frozen=True)
class ListFile:
  """A list at `path`.

  name: what errors call it, as 'prompts file'. columns: those that a .csv file must have. example:
  a row of .jsonl.
  """

  path: pathlib.Path
  name: str
  columns: tuple[str, ...]
  example: str

  def wrong(self, line: int, message: str) -> UserError:
    """Returns the error of a line, counted from 1."""
    return UserError(f"{self.name} {self.path}, line {line}: {message}")

  def text(self) -> io.StringIO:
    """Returns its text, to be iterated over by line. Raises UserError as files.read_text."""
    # Not splitlines, which cuts at U+2028, U+0085, \v and \f too.
    return io.StringIO(read_text(self.path, self.name))

  def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, {column: value}); values of .csv are texts, None where a row is too short.

    Raises UserError, with the line, for what is no row.
    """
    return self._csv_rows() if self.path.suffix.lower() == ".csv" else self._json_rows()

  def check_text(self, line: int, name: str, value: Any) -> str | None:
    """Returns a value without blanks around it, None for none.

    Raises UserError for what is no text, or holds half a pair of surrogates, which no file and no
    tokenizer takes.
    """
    if value is None:
      return None
    if not isinstance(value, str):
      raise self.wrong(line, f"{name} = {value!r}: expected text")
    if not is_whole(value):
      raise self.wrong(line, f"{name} = {value[:60]!r} holds half a character (half an emoji)")
    return value.strip()

  def _json_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(self.text(), 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line, object_pairs_hook=_once)
      except json.JSONDecodeError as error:
        what = f"{error.msg} at column {error.colno}"
        raise self.wrong(number, f"not JSON ({what}); write one object a line") from error
      except (ValueError, RecursionError) as error:  # a number of thousands of digits, [[[[...
        raise self.wrong(number, f"not JSON ({error})") from error
      if not isinstance(row, dict):
        got = line.strip()[:40]
        raise self.wrong(number, f"expected an object, as {self.example}, got {got!r}")
      yield number, row

  def _csv_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(self.text(), strict=True, skipinitialspace=True)
    start = 1  # the line that a row begins in: an open quote is found many lines later
    try:
      names = [name.strip() for name in reader.fieldnames or ()]
      if names and (missing := [name for name in self.columns if name not in names]):
        raise self.wrong(
          1,
          f"the first line names the columns, one of them {missing[0]}; got {', '.join(names)}",
        )
      if len(set(names)) < len(names):
        raise self.wrong(1, f"a column is named twice: {', '.join(names)}")
      reader.fieldnames = names
      start = reader.line_num + 1
      for row in reader:
        # DictReader collects what stands beyond the named columns under None
        if row.pop(None, None) is not None:
          raise self.wrong(
            reader.line_num,
            f"more than the {len(names)} columns of the first line; quote a "
            f"{self.columns[-1]} that holds commas",
          )
        yield reader.line_num, row
        start = reader.line_num + 1
    except csv.Error as error:
      raise self.wrong(start, f'not CSV ({error}); close each quote, write "" in one') from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the object of JSON's pairs. Raises ValueError for a name that is there twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError(f"a name is there twice: {', '.join(name for name, _ in pairs)}")
  return found
