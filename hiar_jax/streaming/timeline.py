"""Timelines: which prompt from which second on.

    0s: a red circle moving left, 10s: a blue square moving up

On one line or on many; a comma, a semicolon or a line's end stands before each time. Times are
written `10s`, `1.5s`, `2m`, `1m30s`, `1h` or `1:30`, from the start of the video. `10s recache:
...` also shows the model anew, under the new prompt, what it has made so far. A line that starts
with # is a comment. A prompt may hold commas and colons; only what reads as a time and a colon
starts the next one.
"""

from collections.abc import Callable, Iterable
import dataclasses
import os
import pathlib
import re

from hiar_jax.errors import UserError

_TIME = r"(?:\d+(?:\.\d+)?\s*(?:h|m(?:in)?|s(?:ec)?)\s*)+|\d+(?::\d\d)+(?:\.\d+)?"
_MARK = re.compile(rf"(?P<time>{_TIME})(?P<flag>\s+\w+)?\s*:(?=[\s,;]|$)")
_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([hms])")
_BEFORE = re.compile(r"(?:^|[,;\n])[^\S\n]*\Z")  # what may stand before a time
_SECONDS = {"h": 3600, "m": 60, "s": 1}


@dataclasses.dataclass(frozen=True)
class Entry:
  """From `time` (seconds) on, `prompt`. line, column: where it stands, counted from 1."""

  time: float
  prompt: str
  recache: bool = False
  line: int = 1
  column: int = 1


@dataclasses.dataclass(frozen=True)
class Change:
  """From block `block` on, `prompt`."""

  block: int
  prompt: str
  recache: bool = False


@dataclasses.dataclass(frozen=True)
class Timeline:
  """The entries in order; times grow. source: what errors call it."""

  entries: tuple[Entry, ...]
  source: str = "timeline"

  def changes(self, start: Callable[[int], float], first: int = 0) -> list[Change]:
    """Each entry at the first block that starts at its time or later.

    start: block -> second at which its first frame is shown, growing. first: blocks before it are
    made already, or given: what belongs before it is left out but for the last one, which holds at
    `first`. Raises UserError where two entries fall on one block.
    """
    changes: list[tuple[Change, Entry]] = []
    for entry in self.entries:
      change = Change(_block_at(entry.time, start), entry.prompt, entry.recache)
      if change.block < first:
        change = Change(first, entry.prompt)  # what was made already is not shown anew
        changes = []
      elif changes and changes[-1][0].block == change.block:
        apart = start(change.block + 1) - start(change.block)
        same = (
          f"{entry.time:g}s falls on the same block as {changes[-1][1].time:g}s before it "
          f"(the block at {start(change.block):g}s)"
        )
        raise _wrong(self.source, entry, f"{same}; blocks start {apart:g}s apart")
      changes.append((change, entry))
    return [change for change, _ in changes]

  def text(self) -> str:
    """A line an entry, as `parse` reads it."""
    return write((entry.time, entry.prompt, entry.recache) for entry in self.entries)


def write(entries: Iterable[tuple[float, str, bool]]) -> str:
  """(seconds, prompt, recache) -> a timeline's text."""
  return "".join(
    f"{time:g}s{' recache' if recache else ''}: {prompt}\n" for time, prompt, recache in entries
  )


def read(source: str | os.PathLike) -> Timeline:
  """A file's timeline; where there is no such file, the text itself is one if it starts with a
  time.

  Raises UserError, with line and column, for what `parse` refuses; and for a file that is not there
  or is no text.
  """
  path, text = pathlib.Path(source), os.fspath(source)
  if _MARK.match(text.lstrip()):
    return parse(text)
  try:
    return parse(path.read_text(encoding="utf-8-sig"), f"timeline {path}")
  except UnicodeDecodeError as error:
    raise UserError(
      f"timeline {path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
    ) from error
  except OSError as error:
    wanted = "give a file, or a text as '0s: a red circle, 10s: a blue square'"
    raise UserError(f"timeline {text[:80]!r}: {error.strerror}; {wanted}") from error


def parse(text: str, source: str = "timeline") -> Timeline:
  """The entries of a text.

  Raises UserError, with line and column, for text before the first time, a time that is none, an
  unknown word after one, a prompt that is missing, times that do not grow, a first one that is not
  0.
  """
  text = "\n".join("" if line.lstrip().startswith("#") else line for line in text.splitlines())
  marks = [mark for mark in _MARK.finditer(text) if _BEFORE.search(text, 0, mark.start())]
  head = text[: marks[0].start()] if marks else text
  if head.strip():
    at = _place(text, len(head) - len(head.lstrip()))
    raise _wrong(
      source,
      at,
      "expected a time and a colon, as '0s: a red circle', got "
      f"{head.strip().splitlines()[0][:40]!r}",
    )
  if not marks:
    raise UserError(f"{source} holds no prompt; write '0s: a red circle' into it")
  entries: list[Entry] = []
  for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
    entries.append(_entry(text, mark, end, source))
    _check_order(entries, source)
  return Timeline(tuple(entries), source)


def _entry(text: str, mark: re.Match, end: int, source: str) -> Entry:
  at, flag = _place(text, mark.start()), (mark["flag"] or "").strip()
  if flag not in ("", "recache"):
    raise _wrong(
      source,
      _place(text, mark.start("flag") + 1),
      f"expected 'recache' or a colon after the time, got {flag!r}",
    )
  prompt = " ".join(text[mark.end() : end].rstrip().rstrip(",;").split())
  if not prompt:
    raise _wrong(
      source, at, f'no prompt after {mark["time"].strip()}; the empty prompt is written ""'
    )
  return Entry(
    _seconds(mark["time"], at, source),
    "" if prompt == '""' else prompt,
    bool(flag),
    at.line,
    at.column,
  )


def _seconds(text: str, at: Entry, source: str) -> float:
  if ":" not in text:
    return sum(float(number) * _SECONDS[unit] for number, unit in _UNIT.findall(text))
  first, *rest = text.split(":")
  total = float(first)
  for part in rest:
    if float(part) >= 60 or len(rest) > 2:
      raise _wrong(source, at, f"{text} is not a time; write 90s, 1m30s, 1:30 or 1:00:30")
    total = total * 60 + float(part)
  return total


def _check_order(entries: list[Entry], source: str) -> None:
  last = entries[-1]
  if len(entries) == 1 and last.time != 0:
    raise _wrong(
      source,
      last,
      f"the first prompt starts at {last.time:g}s; expected 0s, for the video needs one from its "
      "start",
    )
  if len(entries) > 1 and last.time <= entries[-2].time:
    raise _wrong(
      source, last, f"{last.time:g}s comes after {entries[-2].time:g}s; expected times that grow"
    )


def _block_at(time: float, start: Callable[[int], float]) -> int:
  """The first block with start(block) >= time."""
  high = 1
  while start(high) < time - 1e-6:
    high *= 2
  low = 0 if start(0) >= time - 1e-6 else high // 2
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if start(middle) >= time - 1e-6 else (middle + 1, high)
  return low


def _place(text: str, offset: int) -> Entry:
  """Where in the text, as an entry that says no more."""
  before = text[:offset]
  return Entry(0, "", line=before.count("\n") + 1, column=offset - (before.rfind("\n") + 1) + 1)


def _wrong(source: str, at: Entry, what: str) -> UserError:
  return UserError(f"{source}, line {at.line}, column {at.column}: {what}")
