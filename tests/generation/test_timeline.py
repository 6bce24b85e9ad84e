"""Timelines: what they may look like, on which block a prompt falls, and where a wrong one is
wrong.
"""

import contextlib
import time

import pytest

from hiar_jax.errors import UserError
from hiar_jax.generation import timeline


def told(text):
  return [(entry.time, entry.prompt, entry.recache) for entry in timeline.parse(text).entries]


@pytest.mark.parametrize(
  "text, expected",
  [
    (
      "0s: a red circle, 10s: a blue square",
      [(0, "a red circle", False), (10, "a blue square", False)],
    ),
    (
      "0s: a cat, a dog, and: a bird; 1m30s recache: 2 cats, 3 dogs",
      [(0, "a cat, a dog, and: a bird", False), (90, "2 cats, 3 dogs", True)],
    ),
    (
      "# what happens\n0:00: one\n  of them\n\n1:05.5: two\n",
      [(0, "one of them", False), (65.5, "two", False)],
    ),
    ('0s: "", 2m: at 10s: it ends', [(0, "", False), (120, "at 10s: it ends", False)]),
    ("0s: a, 1h: b, 1:00:30: c", [(0, "a", False), (3600, "b", False), (3630, "c", False)]),
    ("0s: eleven,\n.5 of them, 1.5s: b", [(0, "eleven, .5 of them", False), (1.5, "b", False)]),
    ("0s: a, 16:9 film, 2 dogs", [(0, "a, 16:9 film, 2 dogs", False)]),
    (
      "0s: a\u20285s: b\x0b# c\x85\r\n1s: d\r2s: e",
      [(0, "a 5s: b # c", False), (1, "d", False), (2, "e", False)],
    ),
  ],
)
def test_what_is_read(text, expected):
  assert told(text) == expected


def test_what_is_written_is_read_again():
  entries = timeline.parse('0s: a red, or blue, circle; 2.5s recache: b: c; 4s: ""')
  assert entries.text() == '0s: a red, or blue, circle\n2.5s recache: b: c\n4s: ""\n'
  again = timeline.parse(entries.text())
  assert [(e.time, e.prompt, e.recache) for e in again.entries] == [
    (e.time, e.prompt, e.recache) for e in entries.entries
  ]


@pytest.mark.parametrize(
  "text, where, what",
  [
    ("0s: a, 10s: b,\n 5s: c", "line 2, column 2", "5s comes after 10s; expected times that grow"),
    ("0s: a, 0s: b", "line 1, column 8", "0s comes after 0s"),
    (
      "a red circle",
      "line 1, column 1",
      "expected a time and a colon, as '0s: a red circle', got 'a red circle'",
    ),
    ("\n  ten: a", "line 2, column 3", "got 'ten: a'"),
    ("0s: a, 10s:, 20s: b", "line 1, column 8", "no prompt after 10s"),
    ("5s: a", "line 1, column 1", "the first prompt starts at 5s; expected 0s"),
    (
      "0s: a\n1s again: b",
      "line 2, column 4",
      "expected 'recache' or a colon after the time, got 'again'",
    ),
    ("0s: a, 1:75: b", "line 1, column 8", "1:75 is not a time"),
  ],
)
def test_what_is_wrong_is_named_with_line_and_column(text, where, what):
  with pytest.raises(UserError) as error:
    timeline.parse(text, "timeline day.txt")
  assert str(error.value).startswith(f"timeline day.txt, {where}: ") and what in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "time",
  [
    *("5s:b", "5S: b", "5secs: b", "5 seconds: b", "500ms: b", "1m30: b", "1:5: b", "90: b"),
    *("-5s: b", ".5s: b", "1e3s: b", "5s recache b: c", "5 s\uff1ab", "5\u79d2: b"),
  ],
)
def test_a_time_that_cannot_be_read_is_no_part_of_a_prompt(time):
  for text, where in (
    (f"0s: a, {time}", "line 1, column 8"),
    (f"0s: a\n {time}", "line 2, column 2"),
  ):
    with pytest.raises(UserError, match=f"{where}: '.*' is no time that can be read"):
      timeline.read(text)
  with pytest.raises(UserError, match="line 1, column 1: .* is no time that can be read"):
    timeline.read(time)


def test_files_and_texts(tmp_path, monkeypatch):
  path = tmp_path / "day.txt"
  path.write_text("\ufeff0s: a\n10s: b\n")
  assert timeline.read(path).entries == timeline.read(str(path)).entries
  assert [entry.time for entry in timeline.read("0s: a, 10s: b").entries] == [0, 10]
  with pytest.raises(UserError, match="holds a byte that is not UTF-8"):
    timeline.read("0s: a \udcff")
  longer_than_a_name = ", ".join(f"{second}s: a red circle" for second in range(50))
  assert len(timeline.read(longer_than_a_name).entries) == 50
  monkeypatch.setenv("HOME", str(tmp_path))
  assert timeline.read(f"~/{path.name}").entries == timeline.read(path).entries
  path.write_text("0s: a\n10s: b\n", encoding="utf-16")
  assert [entry.prompt for entry in timeline.read(path).entries] == ["a", "b"]
  (tmp_path / "latin.txt").write_bytes("0s: größer".encode("latin-1"))
  (tmp_path / "empty.txt").write_text("# nothing\n")
  for name, what in (
    ("latin.txt", "not UTF-8"),
    ("empty.txt", "holds no prompt"),
    ("absent.txt", "No such file"),
    (".", "Is a directory"),
  ):
    with pytest.raises(UserError, match=what):
      timeline.read(tmp_path / name)


def blocks_of_12_frames(block):
  """Wan's: 9 frames, then 12 a block, 16 a second."""
  return max(0, 12 * block - 3) / 16


def test_prompts_fall_on_the_next_block():
  entries = timeline.parse("0s: a, 0.5625s: b, 0.6s: c, 100s: d")
  assert [(c.block, c.prompt) for c in entries.changes(blocks_of_12_frames)] == [
    (0, "a"),
    (1, "b"),
    (2, "c"),
    (134, "d"),
  ]
  assert blocks_of_12_frames(133) < 100 <= blocks_of_12_frames(134)


def test_two_prompts_on_one_block_are_refused():
  with pytest.raises(
    UserError,
    match=r"line 1, column 17: 0.5s falls on the same block as 0.1s .*0.5625s.*0.75s apart",
  ):
    timeline.parse("0s: a, 0.1s: b, 0.5s: c").changes(blocks_of_12_frames)


def test_what_is_past_is_left_out():
  entries = timeline.parse("0s: a, 1s recache: b, 100s: c")
  assert [(c.block, c.prompt, c.recache) for c in entries.changes(blocks_of_12_frames, 7)] == [
    (7, "b", False),
    (134, "c", False),
  ]


def test_what_begins_where_the_new_blocks_do_replaces_what_is_past():
  entries = timeline.parse("0s: a, 0.1s: b, 0.5625s: c")
  assert [(c.block, c.prompt) for c in entries.changes(blocks_of_12_frames, 1)] == [(1, "c")]


@pytest.mark.parametrize(
  "part", ["9", "1 ", "1s ", " ", "1:", "1:30 ", "1.5.", "1h2", "a1 ", ", 1 ", "1s x "], ids=repr
)
def test_no_text_takes_long(part):
  """A third of a million letters are read or refused at once: quadratic, they would take hours."""
  for text in (part * (300_000 // len(part)), "0s: a, " + part * (300_000 // len(part))):
    start = time.monotonic()
    with contextlib.suppress(UserError):
      timeline.parse(text)
    assert time.monotonic() - start < 10
