"""Reports of rows: markdown tables and a figure, one line a row.

A result is `shapes_truth.measure`'s, or one of `result_of`, which has intervals too and may have
its difference from a reference row.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.evaluation import bootstrap
from hiar_jax.evaluation.rows import Row
from hiar_jax.files import write_atomic
from hiar_jax.video.png import write_png

_COLUMNS = (  # (key of a result, format, header)
  ("colour", "{:.1%}", "colour"),
  ("shape", "{:.1%}", "shape"),
  ("direction", "{:.0%}", "direction"),
  ("motion", "{:.2f}", "motion, px/frame"),
  ("motion_ratio", "{:.2f}", "motion / data"),
  ("jumps", "{:.2%}", "jumps"),
  ("error", "{:.4f}", "error"),
)
_LAST = ("error_last_over_first", "{:.2f}", "last / first")
_PASSAGE = (  # (key of `shapes_passage.summarise`, format, header)
  ("returned", "{:.0%}", "came back"),
  ("agree", "{:.0%}", "same colour"),
  ("chance", "{:.0%}", "by chance"),
  ("unseen", "{:.1f}", "frames unseen"),
)
_FIFTHS = (  # those of the table per fifth
  ("error", "{:.4f}"),
  ("motion_ratio", "{:.2f}"),
  ("colour", "{:.1%}"),
  ("shape", "{:.1%}"),
)
_PANELS = (
  ("error", "error to the nearest rendering"),
  ("motion_ratio", "motion / data"),
  ("colour", "colour right"),
  ("shape", "shape right"),
)


def result_of(row: Row) -> dict:
  """Returns a row's result as JSON values: its means, intervals, and what each video comes to."""
  return {
    **bootstrap.means(row),
    "intervals": bootstrap.intervals(row),
    "relative_error": row.relative_error,
    "prompts": bootstrap.of_each_video(row),
    "settings": row.settings,
    "command": row.command,
  }


def reference_of(rows: Sequence[Row], name: str | None = None) -> Row:
  """Returns the row of a name; None: the first run's. Raises UserError where no row has it."""
  named = {row.name: row for row in rows}
  if name and name not in named:
    raise UserError(f"--reference={name}: expected one of {'; '.join(named)}")
  return named[name] if name else next((row for row in rows if row.kind == "run"), rows[0])


def results_of(rows: Sequence[Row], reference: Row) -> dict[str, dict]:
  """Returns {name: result}, with `difference` from the reference row where the prompts are its
  own.
  """
  results = {}
  for row in rows:
    results[row.name] = result_of(row)
    found = None if row is reference else bootstrap.difference(row, reference)
    if found:
      results[row.name]["difference"] = {"reference": reference.name, **found}
  return results


def write(rows: Sequence[Row], directory: Path, reference: str | None = None) -> str:
  """Writes metrics.json, table.md and fifths.png of rows, and returns the tables.

  The figure has the rows whose videos are as long as the reference's: fifths of other lengths (the
  teacher's) cannot be drawn over the same axis. reference: a name, as in `reference_of`.
  """
  first = reference_of(rows, reference)
  results = results_of(rows, first)
  parts = [format_table(results), _of_what(rows), format_fifths(results)]
  if any("difference" in result for result in results.values()):
    parts.append(format_differences(results))
  text = "\n\n".join(parts)
  write_atomic(directory / "metrics.json", json.dumps(results, indent=2).encode())
  write_atomic(directory / "table.md", (text + "\n").encode())
  frames = first.settings["frames"]
  drawn = {name: x for name, x in results.items() if x["settings"]["frames"] == frames}
  plot(drawn, directory / "fifths.png")
  return text


def format_table(results: Mapping[str, Mapping]) -> str:
  """Returns a markdown table of {method: result}; a dash where nothing could be measured.

  Columns on the passage behind the screen are added where the world has one.
  """
  columns = _columns(results)
  fifths = 1 + len(_COLUMNS)  # the place of their column
  header = ["method", *(title for _, _, title in columns)]
  header.insert(fifths, "error per fifth")
  rows = []
  for name, result in results.items():
    bounds = result.get("intervals")
    cells = [_cell(_at(result, path), form, _at(bounds, path)) for path, form, _ in columns]
    rows.append([name, *cells])
    each = (_cell(value, "{:.4f}") for value in result["error"]["fifths"])
    rows[-1].insert(fifths, " ".join(each))
  return _markdown(header, rows)


def format_fifths(results: Mapping[str, Mapping]) -> str:
  """Returns a markdown table of error, motion, colour and shape per fifth of the videos."""
  header = ("method", "per fifth", "1", "2", "3", "4", "5")
  rows = []
  for name, result in results.items():
    for key, form in _FIFTHS:
      bounds = _at(result.get("intervals"), (key, "fifths")) or [None] * 5
      both = zip(result[key]["fifths"], bounds, strict=True)
      title = key.replace("motion_ratio", "motion / data")
      rows.append((name, title, *(_cell(value, form, bound) for value, bound in both)))
  return _markdown(header, rows)


def format_differences(results: Mapping[str, Mapping]) -> str:
  """Returns a markdown table of the rows' differences from the reference row; a row whose prompts
  or length are others is left out.
  """
  found = {name: x["difference"] for name, x in results.items() if "difference" in x}
  columns = _columns({name: x["value"] for name, x in found.items()})
  reference = next(iter(found.values()))["reference"]
  header = (f"less {reference}", *(title for _, _, title in columns))
  rows = []
  for name, x in found.items():
    cells = [
      _cell(_at(x["value"], path), form.replace("{:", "{:+"), _at(x["interval"], path))
      for path, form, _ in columns
    ]
    rows.append((name, *cells))
  return _markdown(header, rows)


def plot(results: Mapping[str, Mapping], path) -> Path:
  """Draws error, motion, colour and shape per fifth of the video, one line per method, as a PNG;
  intervals, where there are any, as bands.

  Returns the path.
  """
  # Without pyplot: no global state, no display.
  figure = Figure(figsize=(12, 3.9), layout="constrained")
  for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
    for name, result in results.items():
      values = [np.nan if value is None else value for value in result[key]["fifths"]]
      places = range(1, len(values) + 1)
      (line,) = axes.plot(places, values, marker="o", markersize=4, label=name)
      bounds = _at(result.get("intervals"), (key, "fifths"))
      if bounds:
        low, high = np.asarray([bound or (np.nan, np.nan) for bound in bounds]).T
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="fifth of the video", xticks=range(1, len(values) + 1))
    # Shares end at 1; the margin keeps a line at 1 visible.
    axes.set_ylim(bottom=0, top=None if key in ("error", "motion_ratio") else 1.03)
    axes.grid(alpha=0.3)
  figure.legend(
    *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
  )
  canvas = FigureCanvasAgg(figure)
  figure.set_dpi(130)
  canvas.draw()
  return write_png(path, np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _of_what(rows: Sequence[Row]) -> str:
  """Returns a line on the intervals, and one for each kind of set of videos."""
  lines = [f"In brackets: {bootstrap.LEVEL} % intervals by a bootstrap over prompts."]
  sets: dict[tuple, list[str]] = {}
  for row in rows:
    sets.setdefault((len(row.prompts), row.settings["frames"], len(set(row.prompts))), []).append(
      row.name
    )
  for (videos, frames, prompts), names in sets.items():
    lines.append(f"{videos} videos of {frames} frames, {prompts} prompts: {'; '.join(names)}.")
  return "\n".join(lines)


def _columns(results: Mapping[str, Mapping]) -> list[tuple[tuple[str, ...], str, str]]:
  """Returns (path in a result, format, header) of the columns."""
  columns = [((key, "total"), form, title) for key, form, title in _COLUMNS]
  columns.append(((_LAST[0],), *_LAST[1:]))
  if any("passage" in result for result in results.values()):
    columns += [(("passage", key), form, title) for key, form, title in _PASSAGE]
  return columns


def _at(tree: Mapping | None, path: Iterable[str]):
  """Returns what lies at a path of keys; None where it ends before."""
  for key in path:
    tree = tree.get(key) if tree else None
  return tree


def _cell(value: float | None, form: str, bounds: Sequence[float] | None = None) -> str:
  if value is None:
    return "–"
  if bounds is None:
    return form.format(value)
  low, high = (form.format(bound).removesuffix("%") for bound in bounds)
  return f"{form.format(value)} ({low} to {high})"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [header, ("---",) * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
