"""A row of a comparison: what each of its videos measures, as sums that any set of them adds up to.

A row is one small JSON file, from which tables and figures are made without the run that made it:

    {"format": 1, "name": ..., "kind": ..., "command": ..., "settings": ..., "config": ...,
     "relative_error": ..., "hidden": ...,
     "videos": [
      {"prompt": ..., "colour": [[9, 9, 9, 8, 9], [9, 9, 9, 9, 9]], ..., "passage": [0, 0, 14]},
      ...]}

A metric of a video is [its sums, the numbers that were summed], per fifth of the video where there
are five. The file depends on what was measured alone: no date, no machine, no revision.
"""

from collections.abc import Iterable
import dataclasses
import json
import os
import pathlib
import re

import numpy as np

from hiar_jax.config.workdir import difference
from hiar_jax.errors import Damaged, UserError
from hiar_jax.evaluation import drift, shapes_truth
from hiar_jax.evaluation.shapes_passage import Passage
from hiar_jax.files import write_atomic

FORMAT = 1
KINDS = ("data", "codec", "teacher", "causal_init", "run")  # in the order of a table
FIFTHS = (
  "recognised",
  "colour",
  "shape",
  "background",
  "hidden",
  "motion",
  "expected_motion",
  "jumps",
  "error",
  *drift.METRICS,
)
WHOLE = ("direction", *(f"{name}_start_end" for name in drift.METRICS))
DIGITS = 7  # significant ones of what is kept: as many as float32 has
_ADVICE = "remove it and measure the row again"


@dataclasses.dataclass(frozen=True)
class Row:
  """The videos of a row, n.

  name: unique in a table. kind: of KINDS. command: that makes it. settings: how it was measured.
  config: the groups of the run's config that the videos depend on. sums, counts: {metric: [n, 5]}
  of FIFTHS and [n, 1] of WHOLE. passages, hidden: as in shapes_truth.Judged.
  """

  name: str
  kind: str
  command: str
  settings: dict
  config: dict
  relative_error: dict
  prompts: tuple[str, ...]
  sums: dict[str, np.ndarray]
  counts: dict[str, np.ndarray]
  passages: tuple[Passage, ...] | None = None
  hidden: int = 0


def of_judged(judged: shapes_truth.Judged, **facts) -> Row:
  """Returns the row of judged videos; facts: name, kind, command, config, and `settings` beside
  those of `judged`.
  """
  sums, counts = {}, {}
  for name, values in {**judged.values, **judged.drift}.items():
    parts = [values[:, part] for part in drift.segments(values.shape[1])]
    parts = [part.reshape(len(part), -1) for part in parts]
    sums[name] = np.stack([np.nansum(part, 1) for part in parts], 1)
    counts[name] = np.stack([(~np.isnan(part)).sum(1) for part in parts], 1)
  sums["direction"] = np.nansum(judged.headed, 1, keepdims=True)
  counts["direction"] = (~np.isnan(judged.headed)).sum(1, keepdims=True)
  for name, values in judged.drift.items():
    sums[f"{name}_start_end"] = drift.contrast(values)[:, None]
    counts[f"{name}_start_end"] = np.ones((len(values), 1), int)
  return Row(
    **{**facts, "settings": judged.settings | facts.get("settings", {})},
    relative_error=shapes_truth.relative_error(judged.relative),
    prompts=tuple(judged.prompts),
    # as a file keeps them, so that a table is the same before and after
    sums={name: np.vectorize(_rounded)(x.astype(float)) for name, x in sums.items()},
    counts=counts,
    passages=None if judged.passages is None else tuple(judged.passages),
    hidden=judged.hidden,
  )


def file_name(name: str) -> str:
  """Returns the name of a row's file."""
  return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def check_free(directory: str | os.PathLike, name: str, config: dict) -> None:
  """Raises UserError where the row's file is there and was made by another config."""
  path = pathlib.Path(directory) / file_name(name)
  if not path.exists():
    return
  stored = read(path)
  lines = difference(stored.config, config)
  if lines or stored.name != name:
    raise UserError(
      f"{path} holds {stored.name!r} of another config (stored -> given: {'; '.join(lines)}); take "
      "another folder, or leave rows that are no run's own out with --baselines="
    )


def write(directory: str | os.PathLike, row: Row) -> pathlib.Path:
  """Writes the row's file, atomically, and returns its path."""
  return write_atomic(pathlib.Path(directory) / file_name(row.name), encode(row).encode())


def encode(row: Row) -> str:
  """Returns the row as the text of its file: a line for each video."""
  facts = {"format": FORMAT}
  for field in dataclasses.fields(row):
    if field.name not in ("prompts", "sums", "counts", "passages"):
      facts[field.name] = getattr(row, field.name)
  videos = []
  for i, prompt in enumerate(row.prompts):
    video = {"prompt": prompt}
    for name in (*FIFTHS, *WHOLE):
      video[name] = [list(map(_short, row.sums[name][i])), row.counts[name][i].tolist()]
    if row.passages is not None:
      video["passage"] = dataclasses.astuple(row.passages[i])
    videos.append(json.dumps(video, allow_nan=False))
  head = json.dumps(facts, indent=1, allow_nan=False).removesuffix("\n}")
  return f'{head},\n "videos": [\n  ' + ",\n  ".join(videos) + "\n ]\n}\n"


def read(path: str | os.PathLike) -> Row:
  """Reads a row's file. Raises UserError, in one line, for a file that is none."""
  path = pathlib.Path(path)
  try:
    stored = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); give a row's file") from error
  except ValueError as error:  # of json, and of bytes that are no text
    raise Damaged(path, f"it is not JSON: {error}", _ADVICE) from error
  if not isinstance(stored, dict) or "format" not in stored:
    raise UserError(f"{path} is no row of hiar_jax.evaluate; give files that --rows wrote")
  if stored["format"] != FORMAT:
    raise UserError(f"{path} has format {stored['format']!r}, not {FORMAT}; measure the row again")
  try:
    return _row(stored)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise Damaged(path, reason, _ADVICE) from error


def read_all(places: Iterable[str | os.PathLike]) -> list[Row]:
  """Reads files, and all files of folders by their names, in the order of a table.

  Raises UserError where there is none, or where two have one name.
  """
  found: dict[str, Row] = {}
  for place in map(pathlib.Path, places):
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files:
      raise UserError(f"{place} holds no rows (*.json); --rows={place} makes them from runs")
    for path in files:
      row = read(path)
      if row.name in found:
        raise UserError(f"{path}: there are two rows of the name {row.name!r}; give one of them")
      found[row.name] = row
  return in_order(found.values())


def in_order(rows: Iterable[Row]) -> list[Row]:
  """Returns rows by their kinds; within a kind they keep their order."""
  return sorted(rows, key=lambda row: KINDS.index(row.kind))


def _row(stored: dict) -> Row:
  """Returns the row of a file's content. Raises KeyError, TypeError or ValueError for another."""
  videos = stored["videos"]
  if not videos or stored["kind"] not in KINDS:
    raise ValueError(f"kind {stored['kind']!r}, {len(videos)} videos")
  sums, counts = {}, {}
  for name, width in {**dict.fromkeys(FIFTHS, 5), **dict.fromkeys(WHOLE, 1)}.items():
    both = np.asarray([video[name] for video in videos], float)
    if both.shape != (len(videos), 2, width) or not np.isfinite(both).all():
      raise ValueError(f"{name} is not {width} sums and counts of each video")
    # contiguous, as those of measured videos: products of other layouts round otherwise
    sums[name], counts[name] = both[:, 0].copy(), both[:, 1].astype(int)
  passages = None
  if stored["hidden"]:
    passages = tuple(Passage(*video["passage"]) for video in videos)
  facts = ("name", "kind", "command", "settings", "config", "relative_error", "hidden")
  return Row(
    **{name: stored[name] for name in facts},
    prompts=tuple(str(video["prompt"]) for video in videos),
    sums=sums,
    counts=counts,
    passages=passages,
  )


def _rounded(value: float) -> float:
  return float(f"{value:.{DIGITS}g}")


def _short(value: float) -> float | int:
  """A number as JSON writes it shortest."""
  return int(value) if value == int(value) else float(value)
