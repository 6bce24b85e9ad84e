"""Files of prompts, a row each, as generation and training read them.

    prompts.txt     A cat walks on grass
                    # a comment
                    seed=7 image=cat.png out=cat.mp4 | The same cat, from a picture
    prompts.jsonl   {"prompt": "A cat walks on grass", "seed": 7, "image": "cat.png"}
    prompts.csv     prompt,seed,video
                    "A cat, then a dog",7,cat.mp4

In .txt, settings stand before a ` | `, quoted where they hold spaces (image="my cat.png"); a line
without settings is a prompt as it stands. The empty prompt is written `""` in .txt and .csv.
"""

from collections.abc import Iterator
import difflib
import os
import pathlib
import re
import sys
from typing import Any

from hiar_jax.data.list_file import ListFile
from hiar_jax.errors import UserError

FIELDS = ("prompt", "seed", "image", "video", "out", "end_image", "end_video", "timeline", "takes")

_SETTING = r"(\w+)=(\"[^\"]*\"|'[^']*'|[^\s|\"']*)"  # name=value, name="value" or name='value'
_SETTINGS = re.compile(rf"\s*(?:{_SETTING}(?:\s+|(?=\|)))+\|")
# Settings of known names that _SETTINGS does not accept: an error, not the words of a prompt.
_BROKEN = re.compile(rf"\s*(?:{'|'.join(FIELDS)})=[^|]*\|")
_EMPTY = '""'  # a prompt without words; nothing at all would read as a missing prompt


def read_rows(path: str | os.PathLike) -> tuple[ListFile, list[tuple[int, dict[str, Any]]]]:
  """Reads a .txt, .jsonl or .csv file (another ending is read as .txt).

  Returns the file, for errors of its rows, and (line, {field: value}) of each: fields are those of
  FIELDS, values texts without blanks around them or None, `seed` as it stands. Each has a prompt.

  Raises UserError, with file and line, for a missing file, no prompt, text that is neither UTF-8
  nor UTF-16, a broken row, an unknown field, or a value that is no text.
  """
  file = ListFile(pathlib.Path(path), "prompts file", ("prompt",), '{"prompt": "a cat"}')
  if not os.path.isfile(file.path):
    raise UserError(f"prompts file {path} does not exist; write one prompt a line into it")
  suffix = file.path.suffix.lower()
  if suffix == ".json":
    raise UserError(f"prompts file {path}: expected .jsonl, one object a line, .csv or .txt")
  rows = file.rows() if suffix in (".jsonl", ".csv") else _text_rows(file)
  if suffix == ".csv":
    rows = ((line, {**row, "prompt": _unquote_empty(row["prompt"])}) for line, row in rows)
  checked = [(line, _checked(row, file, line)) for line, row in rows]
  if not checked:
    raise UserError(f"prompts file {path} holds no prompt; write one a line (# starts a comment)")
  return file, checked


def read_prompts(path: str | os.PathLike, say: bool = False) -> list[str]:
  """Returns the prompts alone of a file, in its order.

  say: whether to print which settings of its rows are left out. Raises UserError as read_rows.
  """
  _, rows = read_rows(path)
  given = {name for _, row in rows for name, value in row.items() if value not in (None, "")}
  settings = [name for name in FIELDS[1:] if name in given]
  if say and settings:
    print(f"{path}: read for its prompts alone, without {', '.join(settings)}", file=sys.stderr)
  return [row["prompt"] for _, row in rows]


def _text_rows(file: ListFile) -> Iterator[tuple[int, dict[str, Any]]]:
  for number, line in enumerate(file.text(), 1):
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    match = _SETTINGS.match(line)
    if not match and _BROKEN.match(line):
      raise file.wrong(
        number, "expected name=value settings before the |, in quotes where they hold spaces"
      )
    # a repeated group keeps its last match alone, so the settings are found again one by one
    row = {}
    for name, value in re.findall(_SETTING, match[0]) if match else ():
      if name in row:
        raise file.wrong(number, f"{name} is given twice")
      row[name] = value.strip("\"'")
    if "prompt" in row:
      raise file.wrong(number, "the prompt stands after the |, not before it")
    yield number, {**row, "prompt": _unquote_empty(line[match.end() :] if match else line)}


def _unquote_empty(prompt: str | None) -> str | None:
  """A prompt of .txt or .csv: '""' is the empty one, nothing is None."""
  prompt = (prompt or "").strip()
  return "" if prompt == _EMPTY else prompt or None


def _checked(row: dict[str, Any], file: ListFile, line: int) -> dict[str, Any]:
  for name in row:
    if name not in FIELDS:
      close = difflib.get_close_matches(str(name), FIELDS, n=1)
      there_is = f"did you mean {close[0]!r}?" if close else "there is " + ", ".join(FIELDS)
      raise file.wrong(line, f"there is no field {name!r}; {there_is}")
  texts = {name: file.check_text(line, name, row[name]) for name in row if name != "seed"}
  if texts.get("prompt") is None:
    raise file.wrong(line, f"there is no prompt; an empty one is written {_EMPTY}")
  return {**row, **texts}
