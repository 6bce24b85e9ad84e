"""The tables of results on the pages are those that the rows in docs/rows make."""

import re

import pytest

from hiar_jax.evaluation import report, rows
from tests.helpers import tiny_run

DOCS = tiny_run.ROOT / "docs"


def made(folder: str) -> list[str]:
  """The lines of the table, without its header."""
  found = rows.read_all([DOCS / "rows" / folder])
  return report.format_table({row.name: report.result_of(row) for row in found}).splitlines()[2:]


def cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def shapes() -> list[str]:
  return made("shapes")


def test_the_table_of_shapes(shapes):
  page = (DOCS / "shapes.md").read_text().splitlines()
  assert len(shapes) == 10 and set(shapes) <= set(page)


@pytest.mark.parametrize(
  ("page", "folder", "names"),
  [
    ("README.md", "shapes", ["teacher, 9 frames", "HiAR", "Self-Forcing", "Self-Aligned Forcing"]),
    (
      "docs/long_videos.md",
      "long",
      [
        "causal init, as HiAR",
        "HiAR",
        "Self-Forcing",
        "HiAR, clips of 15 frames",
        "HiAR and packed history, clips of 15",
        "FramePack, vanilla",
        "FramePack, both ends first",
        "FramePack, inverted, from a true frame",
        "FramePack, vanilla, discretised (+D)",
        "FramePack, vanilla, `:full`",
      ],
    ),
    ("docs/long_videos.md", "screen", ["21 frames, unpacked", "19 frames, packed", "3 frames"]),
  ],
)
def test_a_shorter_table_with_names_of_its_own(page, folder, names, shapes):
  """Each of its lines holds cells of one row; a page may leave out some, and intervals."""
  rows_ = [cells(line)[1:] for line in (shapes if folder == "shapes" else made(folder))]
  lines = (tiny_run.ROOT / page).read_text().splitlines()
  for name in names:
    shown = next(cells(line)[1:] for line in lines if line.startswith(f"| {name} |"))
    assert len(shown) > 3 and any("(" in cell for cell in shown)
    short = lambda row, shown=shown: (
      {*row, *(re.sub(r" \(.*", "", cell) for cell in row)} >= {*shown}
    )
    assert any(short(row) for row in rows_), f"{name}: {shown}"
