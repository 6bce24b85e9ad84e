"""Timelines: prompts and the seconds from which they hold.

    0s: a red circle moving left, 10s: a blue square moving up

Entries stand on one line or on many; a comma, a semicolon or a line's end precedes each time. Times
are written `10s`, `1.5s`, `2m`, `1m30s`, `1h` or `1:30`, from the start of the video. `10s recache:
...` also encodes the video so far again, under the new prompt. A line that starts with # is a
comment. A prompt may hold commas and colons; only a time with a colon behind it starts the next
entry, and a number with a colon behind that is no such time is an error.
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re

from hiar_jax.errors import UserError
from hiar_jax.files import is_whole, read_text

# Nothing is given back (`++`, `*+`), and nothing begins but behind a separator: each letter is read
# a few times, whatever the text.
_BEFORE = r"(?:^|(?<=[,;]))[^\S\n]*+"  # what may stand before a time
_TIME = r"(?:\d++(?:\.\d++)?\s*+(?:h|m(?:in)?|s(?:ec)?)\s*+)++|\d++(?::\d\d)++(?:\.\d++)?"
# the colon after a time stands before a space, a separator or the end, so that `1:30` is one time
_MARK = re.compile(
  rf"{_BEFORE}(?P<time>{_TIME})\s*+(?:(?<=\s)(?P<flag>\w++))?\s*+:(?=[\s,;]|$)", re.MULTILINE
)
# What begins with a number and has a colon behind was meant as a time, also where it is no _MARK.
# Of `16:9 film`, which has no colon behind, `16:` is none either.
_LIKE_MARK = re.compile(
  rf"{_BEFORE}(?P<like>[-+.]?\d[\w.]*+(?::\d[\w.]*+)*+"
  r"(?:[^\S\n]++[^,;:\uff1a\n]*+)?[:\uff1a])",
  re.MULTILINE,
)
_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([hms])")
_SECONDS = {"h": 3600, "m": 60, "s": 1}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A prompt from `time` (seconds) on. line, column: its place in the text, counted from 1."""

  time: float
  prompt: str
  recache: bool = False
  line: int = 1
  column: int = 1


@dataclasses.dataclass(frozen=True)
class Change:
  """A prompt from block `block` on."""

  block: int
  prompt: str
  recache: bool = False


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Entries in order of time. source: the name that errors give it."""

  entries: tuple[Entry, ...]
  source: str = "timeline"

  def changes(self, start: Callable[[int], float], first: int = 0) -> list[Change]:
    """Returns a change for each entry, at the first block that starts at its time or later.

    start: block -> second at which its first frame is shown, growing. first: blocks before it exist
    already (made, or given); of the entries before it only the last one counts, from `first` on.
    Raises UserError where two entries fall on one block.
    """
    changes: list[tuple[Change, Entry]] = []
    past = False  # whether the entry before this one begins before block `first`
    for entry in self.entries:
      change = Change(_block_at(entry.time, start), entry.prompt, entry.recache)
      if past and change.block <= first:
        changes = []  # that entry no longer holds at `first`
      past = entry.time < start(first) - 1e-6
      if change.block < first:
        # no recache: frames that exist already keep the prompt that they were made with
        change = Change(first, entry.prompt)
      elif changes and changes[-1][0].block == change.block:
        interval = start(change.block + 1) - start(change.block)
        raise _error(
          self.source,
          entry,
          f"{entry.time:g}s falls on the same block as {changes[-1][1].time:g}s before it "
          f"(the block at {start(change.block):g}s); blocks start {interval:g}s apart",
        )
      changes.append((change, entry))
    return [change for change, _ in changes]

  def text(self) -> str:
    """Returns the timeline as text, an entry a line, which `parse` reads back."""
    lines = []
    for entry in self.entries:
      flag, prompt = " recache" * entry.recache, entry.prompt or '""'
      lines.append(f"{entry.time:g}s{flag}: {prompt}\n")
    return "".join(lines)


def read(source: str | os.PathLike, folder: str | os.PathLike = "") -> Timeline:
  """Returns the timeline of a text that starts with a time, or else of the file of that name, from
  `folder` on.

  Raises UserError for what `parse` refuses (with line and column), and for a file that is missing
  or no text.
  """
  text = os.fspath(source)
  path = pathlib.Path(folder) / os.path.expanduser(text)
  if _MARK.match(text.lstrip()) or _LIKE_MARK.match(text.lstrip()):
    if not is_whole(text):
      raise UserError(
        f"timeline {text[:80]!r} holds a byte that is not UTF-8; give it as UTF-8 text"
      )
    return parse(text)
  try:
    return parse(read_text(path, "timeline"), f"timeline {path}")
  except (OSError, ValueError) as error:  # of a name that no file has, as one with a zero byte
    reason = getattr(error, "strerror", None) or error
    raise UserError(
      f"timeline {text[:80]!r}: {reason}; give a file, or a text as '0s: a red circle, "
      "10s: a blue square'"
    ) from error


def parse(text: str, source: str = "timeline") -> Timeline:
  """Returns the timeline of a text.

  Raises UserError, with line and column, for text before the first time, an invalid time, an
  unknown word after one, a missing prompt, times that do not grow, and a first time other than 0.
  """
  # comments become empty lines, so that lines keep their numbers; not splitlines, which cuts at
  # U+2028 and others too
  lines = re.split(r"\r\n?|\n", text)
  text = "\n".join("" if line.lstrip().startswith("#") else line for line in lines)
  marks = list(_MARK.finditer(text))
  read = {mark.start("time") for mark in marks}
  for like in _LIKE_MARK.finditer(text):
    if like.start("like") not in read:
      raise _error(
        source,
        _location(text, like.start("like")),
        f"{like['like'][:40]!r} is no time that can be read; write 10s, 1.5s, 1m30s or 1:30, then "
        "a colon and a blank",
      )
  head = text[: marks[0].start("time")] if marks else text
  if head.strip():
    raise _error(
      source,
      _location(text, len(head) - len(head.lstrip())),
      "expected a time and a colon, as '0s: a red circle', got "
      f"{head.strip().splitlines()[0][:40]!r}",
    )
  if not marks:
    raise UserError(f"{source} holds no prompt; write '0s: a red circle' into it")
  entries: list[Entry] = []
  # each prompt ends where the next time begins
  for mark, end in zip(
    marks, [*(mark.start("time") for mark in marks[1:]), len(text)], strict=True
  ):
    entry = _entry(text, mark, end, source)
    if not entries and entry.time != 0:
      raise _error(
        source,
        entry,
        f"the first prompt starts at {entry.time:g}s; expected 0s, for the video needs one from "
        "its start",
      )
    if entries and entry.time <= entries[-1].time:
      raise _error(
        source,
        entry,
        f"{entry.time:g}s comes after {entries[-1].time:g}s; expected times that grow",
      )
    entries.append(entry)
  return Timeline(tuple(entries), source)


def _entry(text: str, mark: re.Match, end: int, source: str) -> Entry:
  """Returns the entry of a matched time, whose prompt reaches up to the offset `end`."""
  at = _location(text, mark.start("time"))
  flag = mark["flag"] or ""
  if flag not in ("", "recache"):
    raise _error(
      source,
      _location(text, mark.start("flag")),
      f"expected 'recache' or a colon after the time, got {flag!r}",
    )
  prompt = " ".join(text[mark.end() : end].rstrip().rstrip(",;").split())
  if not prompt:
    raise _error(
      source, at, f'no prompt after {mark["time"].strip()}; the empty prompt is written ""'
    )
  time = mark["time"]
  if ":" in time:  # [hours:]minutes:seconds
    first, *rest = time.split(":")
    seconds = float(first)
    for part in rest:
      if float(part) >= 60 or len(rest) > 2:
        raise _error(source, at, f"{time} is not a time; write 90s, 1m30s, 1:30 or 1:00:30")
      seconds = seconds * 60 + float(part)
  else:
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _UNIT.findall(time))
  return Entry(seconds, "" if prompt == '""' else prompt, bool(flag), at.line, at.column)


def _block_at(time: float, start: Callable[[int], float]) -> int:
  """Returns the first block with start(block) >= time (within 1 us, for times in decimals).

  Doubles an upper bound and bisects: `start` is only known to grow, and videos may be endless.
  """
  high = 1
  while start(high) < time - 1e-6:
    high *= 2
  low = 0 if start(0) >= time - 1e-6 else high // 2
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if start(middle) >= time - 1e-6 else (middle + 1, high)
  return low


def _location(text: str, offset: int) -> Entry:
  """Returns an empty entry with the line and column of an offset."""
  before = text[:offset]
  return Entry(0, "", line=before.count("\n") + 1, column=offset - (before.rfind("\n") + 1) + 1)


def _error(source: str, at: Entry, what: str) -> UserError:
  return UserError(f"{source}, line {at.line}, column {at.column}: {what}")
