"""A row's file: the same bytes for the same videos, the same table without the run, and one line
for a file that is none.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.evaluation import report, rows
from tests.helpers.measured_rows import PLAIN, SCREEN, row, table


@pytest.mark.parametrize("world", [PLAIN, SCREEN], ids=["plain", "screen"])
def test_a_file_holds_the_row(world, tmp_path):
  made = row(world=world, frames=world.frames)
  path = rows.write(tmp_path / "rows", made)
  assert path.name == "a-vanilla.json" and [p.name for p in path.parent.iterdir()] == [path.name]
  stored = rows.read(path)
  for field in dataclasses.fields(rows.Row):
    ours, theirs = getattr(made, field.name), getattr(stored, field.name)
    if field.name in ("sums", "counts"):
      assert ours.keys() == theirs.keys()
      for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    else:
      assert ours == theirs, field.name
  assert (stored.passages is None) == (world is PLAIN)
  first = path.read_bytes()
  assert rows.write(tmp_path / "rows", stored).read_bytes() == first
  assert len(first) < 1200 * (len(made.prompts) + 1)  # small enough for a repository
  assert json.loads(first)["settings"]["seed"] == 1000


@pytest.mark.slow
def test_the_table_of_files_is_the_table_of_runs(tmp_path):
  made = table()
  written = [rows.write(tmp_path / "rows", each) for each in reversed(made)]
  report.write(rows.in_order(made), tmp_path / "runs")
  for places, name in (((tmp_path / "rows",), "folder"), (written[::-1], "files")):
    report.write(rows.read_all(places), tmp_path / name)
    for file in ("metrics.json", "table.md", "fifths.png"):
      assert (tmp_path / name / file).read_bytes() == (tmp_path / "runs" / file).read_bytes()
  assert json.loads((tmp_path / "runs" / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_tables_have_intervals_fifths_and_differences(tmp_path):
  text = report.write(table(), tmp_path)
  main, what, fifths, differences = text.split("\n\n")
  assert (tmp_path / "table.md").read_text() == text + "\n"
  lines = [line.strip("| ").split(" | ") for line in main.splitlines()]
  assert [line[0] for line in lines[2:]] == [each.name for each in table()]
  colour = dict(zip(lines[0], lines[4], strict=True))
  assert re.fullmatch(r"[\d.]+% \([\d.]+ to [\d.]+\)", colour["colour"])
  assert re.fullmatch(r"[\d.]{6} \([\d.]{6} to [\d.]{6}\)", colour["error"])
  assert len(colour["error per fifth"].split()) == 5
  assert "6 videos of 9 frames, 3 prompts: true clips; a, vanilla; b, both ends." in what
  assert fifths.count("| b, both ends | motion / data | ") == 1
  assert len(fifths.splitlines()) == 2 + 4 * 4
  head, _, *others = differences.splitlines()
  # neither the teacher, whose clips are shorter, nor true clips of other prompts
  assert head.startswith("| less a, vanilla | colour |") and len(others) == 1
  assert re.match(r"\| b, both ends \| [-+][\d.]+% \([-+][\d.]+ to [-+][\d.]+\) \|", others[0])
  error = others[0].split(" | ")[-2]
  assert error.startswith("+0.0")  # what is spoilt is worse
  again = report.write(table(), tmp_path, reference="b, both ends")
  assert "| less b, both ends |" in again and "| a, vanilla | +" in again
  with pytest.raises(UserError, match="--reference=c: expected one of true clips; teacher"):
    report.write(table(), tmp_path, reference="c")


def test_a_world_with_a_screen_has_its_columns(tmp_path):
  text = report.write([row(world=SCREEN, frames=45)], tmp_path)
  head, _, line = (part.strip("| ").split(" | ") for part in text.split("\n\n")[0].splitlines())
  cells = dict(zip(head, line, strict=True))
  assert cells["came back"] == "100% (100 to 100)" and cells["same colour"] == "100% (100 to 100)"
  assert "less" not in text


def test_a_row_of_another_config_is_not_written_over(tmp_path):
  path = rows.write(tmp_path, row())
  rows.check_free(tmp_path, row().name, row().config)
  rows.check_free(tmp_path, "b, vanilla", {})
  with pytest.raises(UserError, match=r"a-vanilla.json holds 'a, vanilla' of another config"):
    rows.check_free(tmp_path, row().name, {**row().config, "seed": 3})
  with pytest.raises(UserError, match="seed: 0 -> 3"):
    rows.check_free(tmp_path, row().name, {**row().config, "seed": 3})
  with pytest.raises(UserError, match="of another config"):
    rows.check_free(tmp_path, "A. Vanilla", row().config)
  assert path.exists()


def changed(**fields):
  return lambda text: json.dumps({**json.loads(text), **fields})


def without(name):
  return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != name})


def video(**fields):
  def change(text):
    stored = json.loads(text)
    stored["videos"][1].update(fields)
    return json.dumps(stored)

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda text: text[: len(text) // 2], "is damaged (it is not JSON"),
    (lambda text: "\0" * 10, "is damaged (it is not JSON"),
    (lambda text: "[]", "is no row of hiar_jax.evaluate"),
    (lambda text: '{"total": 1}', "is no row of hiar_jax.evaluate"),
    (changed(format=2), "has format 2, not 1; measure the row again"),
    (changed(videos=[]), "is damaged (ValueError: kind 'run', 0 videos)"),
    (changed(kind="guess"), "is damaged (ValueError: kind 'guess'"),
    (without("settings"), "is damaged (KeyError: 'settings')"),
    (video(error=[[1, 2], [1, 1]]), "is damaged (ValueError"),
    (video(error=[[1] * 5, [float("nan")] * 5]), "error is not 5 sums and counts of each video"),
    (video(direction=None), "is damaged ("),
    (changed(hidden=12), "is damaged (KeyError: 'passage')"),
  ],
)
def test_a_file_that_is_none_is_one_line(change, message, tmp_path):
  path = rows.write(tmp_path, row())
  path.write_text(change(path.read_text()))
  with pytest.raises(UserError) as error:
    rows.read_all([tmp_path])
  assert message in str(error.value) and str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_files_that_are_missing_empty_or_twice(tmp_path):
  (tmp_path / "empty").mkdir()
  for place, message in (("empty", "holds no rows"), ("gone.json", "cannot be read (No such")):
    with pytest.raises(UserError, match=re.escape(message)):
      rows.read_all([tmp_path / place])
  paths = [rows.write(tmp_path / name, row()) for name in "ab"]
  with pytest.raises(UserError, match="two rows of the name 'a, vanilla'"):
    rows.read_all(paths)
  assert all(isinstance(path, pathlib.Path) for path in paths)
