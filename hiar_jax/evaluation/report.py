"""Reports of `shapes_truth.measure`: a markdown table and a figure, one line per method."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from hiar_jax.video.png import write_png

_COLUMNS = (  # (key of `measure`, format), in the order of _HEADER
  ("colour", "{:.1%}"),
  ("shape", "{:.1%}"),
  ("direction", "{:.0%}"),
  ("motion", "{:.2f}"),
  ("motion_ratio", "{:.2f}"),
  ("jumps", "{:.2%}"),
  ("error", "{:.4f}"),
)
_HEADER = (
  "method",
  "colour",
  "shape",
  "direction",
  "motion, px/frame",
  "motion / data",
  "jumps",
  "error",
  "error per fifth",
  "last / first",
)
_PASSAGE = (  # (key of `shapes_passage.summarise`, format, header)
  ("returned", "{:.0%}", "came back"),
  ("agree", "{:.0%}", "same colour"),
  ("chance", "{:.0%}", "by chance"),
  ("unseen", "{:.1f}", "frames unseen"),
)
_PANELS = (
  ("error", "error to the nearest rendering"),
  ("motion_ratio", "motion / data"),
  ("colour", "colour right"),
  ("shape", "shape right"),
)


def format_table(results: Mapping[str, Mapping]) -> str:
  """Returns a markdown table of {method: `measure`}; a dash where nothing could be measured.

  Columns on the passage behind the screen are added where the world has one.
  """
  passage = _PASSAGE if any("passage" in result for result in results.values()) else ()
  header = (*_HEADER, *(title for _, _, title in passage))
  rows = [header, ("---",) * len(header)]
  for name, result in results.items():
    cells = [_cell(result[key]["total"], form) for key, form in _COLUMNS]
    fifths = " ".join(_cell(value, "{:.4f}") for value in result["error"]["fifths"])
    ratio = _cell(result["error_last_over_first"], "{:.2f}")
    passed = [_cell(result.get("passage", {}).get(key), form) for key, form, _ in passage]
    rows.append((name, *cells, fifths, ratio, *passed))
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: Mapping[str, Mapping], path) -> Path:
  """Draws error, motion, colour and shape per fifth of the video, one line per method, as a PNG.

  Returns the path.
  """
  # Without pyplot: no global state, no display.
  figure = Figure(figsize=(12, 3.9), layout="constrained")
  for axes, (key, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
    for name, result in results.items():
      values = [np.nan if value is None else value for value in result[key]["fifths"]]
      axes.plot(range(1, len(values) + 1), values, marker="o", markersize=4, label=name)
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


def _cell(value: float | None, form: str) -> str:
  return "–" if value is None else form.format(value)
