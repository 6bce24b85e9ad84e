"""The tables of results on the pages are those that the rows in docs/rows make."""

import functools
import re

import pytest

from hiar_jax.evaluation import report, rows
from tests.helpers import tiny_run
from tests.helpers.slow_cases import slow

DOCS = tiny_run.ROOT / "docs"


@functools.cache
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


# name on the page -> row
SHAPES = {
  "teacher, 9 frames": "teacher, training length",
  "HiAR": "shapes, step-first, output history",
  "Self-Forcing": "self_forcing, block-first, clean history",
  "Self-Aligned Forcing": "self_aligned, step-first, input history, sink 3",
  "HiAR without forward-KL": "no_forward_kl, step-first, output history",
}
LONG = {
  "causal init, as HiAR": "causal init, step-first, output history",
  "HiAR": "shapes, step-first, output history",
  "Self-Forcing": "self_forcing, block-first, clean history",
  "HiAR, clips of 15 frames": "hiar_ring, step-first, output history",
  "HiAR and packed history, clips of 15": "hiar_packed, step-first, output history",
  "FramePack, vanilla": "framepack, td_f16k4f2k2f1k1_g9, vanilla",
  "FramePack, both ends first": "both_ends, td_f16k4f2k2f1k1_g9_x_f1k1, both ends",
  "FramePack, inverted, from a true frame": "inverted, f1k1_x_g9_f1k1f2k2f16k4_td, inverted",
  "FramePack, vanilla, discretised (+D)": "discrete, td_f16k4f2k2f1k1_g9+D, vanilla",
  "FramePack, vanilla, `:full`": "framepack_full, td_f16k4f2k2f1k1_g9, vanilla",
}
SCREEN = {
  "21 frames, unpacked": "screen_long, td_f21k1_g9, vanilla",
  "19 frames, packed": "screen, td_f16k4f2k2f1k1_g9, vanilla",
  "3 frames": "screen_window, td_f3k1_g9, vanilla",
}


@pytest.mark.parametrize(
  ("page", "folder", "names"),
  [
    ("README.md", "shapes", SHAPES),
    ("docs/long_videos.md", "long", LONG),
    ("docs/long_videos.md", "screen", SCREEN),
  ],
)
def test_a_shorter_table_with_names_of_its_own(page, folder, names, shapes):
  """Its lines hold cells of their rows; a page may leave out some, and intervals."""
  table = {line[0]: line[1:] for line in map(cells, shapes if folder == "shapes" else made(folder))}
  lines = (tiny_run.ROOT / page).read_text().splitlines()
  for name, row in names.items():
    shown = next(cells(line)[1:] for line in lines if line.startswith(f"| {name} |"))
    assert len(shown) > 3 and any("(" in cell for cell in shown)
    values = {*table[row], *(re.sub(r" \(.*", "", cell) for cell in table[row])}
    assert values >= {*shown}, f"{name}: {shown}"


@pytest.mark.parametrize(
  ("folder", "less", "row", "shown"),
  [
    ("screen", "19 frames, packed", "3 frames", {"same colour"}),
    *slow(
      ("screen", "19 frames, packed", "21 frames, unpacked", {"same colour"}),
      ("long", "Self-Forcing", "HiAR", {"error", "motion / data", "jumps"}),
      ("long", "FramePack, vanilla", "FramePack, inverted, from a true frame", {"error", "jumps"}),
    ),
  ],
)
def test_differences_in_a_page_s_sentences(folder, less, row, shown):
  names = LONG if folder == "long" else SCREEN
  found = rows.read_all([DOCS / "rows" / folder])
  results = report.results_of(found, report.reference_of(found, names[less]))
  head, _, *lines = map(cells, report.format_differences(results).splitlines())
  (line,) = (line for line in lines if line[0] == names[row])
  page = " ".join((DOCS / "long_videos.md").read_text().split())
  for title in shown:
    assert line[head.index(title)] in page, f"{title}: {line[head.index(title)]}"
