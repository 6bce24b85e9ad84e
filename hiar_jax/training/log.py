"""The log of a run: scalars and preview frames, written to JSONL and to TensorBoard.

A line of `metrics.jsonl` is {"stage": str, "step": int, "time": unix seconds, "scalars": {name:
number or null}}; for previews "image", the path of a PNG beside the file, replaces "scalars".
"""

from collections.abc import Callable
import json
import math
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from hiar_jax.files import write_atomic
from hiar_jax.progress import is_writer
from hiar_jax.video.png import write_png

if TYPE_CHECKING:
  import tensorboardX


class Writer:
  """The writer of `<workdir>/logs/metrics.jsonl` and of TensorBoard event files beside it.

  Writes on process 0 alone. With `resume`, the file of a resumed run equals that of an
  uninterrupted one in everything but `time`.
  """

  def __init__(self, directory: str | os.PathLike):
    """Opens (and creates) `directory`, usually `<workdir>/logs`."""
    self.path = pathlib.Path(directory) / "metrics.jsonl"
    self._jsonl = self._board = None
    if is_writer():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      _drop(self.path, lambda record: False)  # only what is damaged, as the last line by a kill
      self._jsonl = open(self.path, "a", encoding="utf-8")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def resume(self, stage: str, step: int) -> None:
    """Drops the lines of `stage` after `step`, which a run continued from there writes again."""
    if self._jsonl is None:
      return
    # closed first: the file is replaced, and an open handle would append to the old one
    self._jsonl.close()
    _drop(self.path, lambda record: record["stage"] == stage and record["step"] > step)
    self._jsonl = open(self.path, "a", encoding="utf-8")

  def scalars(self, stage: str, step: int, values: dict[str, Any]) -> None:
    """Writes and flushes one line of numbers or 0-d arrays; NaN and infinities become null."""
    if self._jsonl is None:
      return
    numbers = {name: _number(value) for name, value in values.items()}
    self._write(stage, step, {"scalars": numbers})
    for name, value in numbers.items():
      self._tensorboard().add_scalar(
        f"{stage}/{name}", math.nan if value is None else value, int(step)
      )

  def video(self, stage: str, step: int, name: str, clips: np.ndarray, columns: int = 8) -> None:
    """Writes uint8 clips [b f H W 3] as one image, a row for each clip, `columns` frames of it.

    Raises ValueError for arrays of another dtype or rank.
    """
    if self._jsonl is None:
      return
    clips = np.asarray(clips)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
      raise ValueError(f"expected uint8 [b, f, h, w, 3], got {clips.dtype} {list(clips.shape)}")
    strip = film_strip(clips, columns)
    path = self.path.parent / name / f"{stage}-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    # the image first: a line never names a file that is not there
    write_png(path, strip)
    self._write(stage, step, {"image": f"{name}/{path.name}"})
    self._tensorboard().add_image(f"{stage}/{name}", strip, int(step), dataformats="HWC")

  def _write(self, stage: str, step: int, content: dict[str, Any]) -> None:
    record = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **content}
    # NaN is no JSON: allow_nan=False fails here rather than in whoever reads the file
    self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
    self._jsonl.flush()

  def close(self) -> None:
    """Flushes and closes both files; after that the writer ignores all calls."""
    if self._jsonl is not None:
      self._jsonl.close()
    if self._board is not None:
      self._board.close()
    self._jsonl = self._board = None

  def _tensorboard(self) -> "tensorboardX.SummaryWriter":
    """Opens the TensorBoard writer at its first use, so that no run leaves an empty event file."""
    if self._board is None:
      # tensorboardX imports torch wherever that is installed, only to accept its tensors: seconds
      # of start-up. None in sys.modules makes the import fail, which tensorboardX expects.
      hide = "torch" not in sys.modules
      if hide:
        sys.modules["torch"] = None
      try:
        import tensorboardX
      finally:
        if hide:
          del sys.modules["torch"]
      self._board = tensorboardX.SummaryWriter(str(self.path.parent), flush_secs=10)
    return self._board


def film_strip(clips: np.ndarray, columns: int = 8) -> np.ndarray:
  """Makes one image [b*H, columns*W, c] of clips [b f H W c].

  Frames are evenly spaced from the first to the last.
  """
  b, f, h, w, c = clips.shape
  picked = clips[:, np.linspace(0, f - 1, min(columns, f)).round().astype(int)]
  # [b columns H W c] -> [b H columns W c]: frames of a clip side by side, clips below each other
  return picked.transpose(0, 2, 1, 3, 4).reshape(b * h, -1, c)


def read_log(path: str | os.PathLike, stage: str | None = None) -> list[dict]:
  """Reads the records of a `metrics.jsonl` (of one stage, if given) in the order written; damaged
  lines are named and left out.
  """
  records = _records(pathlib.Path(path))
  return [record for _, record in records if stage is None or record["stage"] == stage]


def _number(value: Any) -> int | float | None:
  """Returns a JSON number for a number or one-element array: ints stay ints, NaN and inf: None."""
  value = np.asarray(value).item()
  return value if isinstance(value, int) or math.isfinite(value) else None


def _records(path: pathlib.Path) -> list[tuple[bytes, dict]]:
  """Returns the file's lines, each with its record, without an incomplete last one; names others
  that hold no record on stderr, and leaves them out.
  """
  found = []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
    try:
      record = json.loads(line)
      stage, step = record["stage"], record["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
      stage = step = None
    whole = line.endswith(b"\n")
    if whole and isinstance(stage, str) and isinstance(step, int):
      found.append((line, record))
    elif whole:
      print(f"{path}, line {number} is damaged, and left out", file=sys.stderr)
  return found


def _drop(path: pathlib.Path, unwanted: Callable[[dict], bool]) -> None:
  """Rewrites the file without unwanted records and what is no record, if there are any."""
  if not path.exists():
    return
  kept = b"".join(line for line, record in _records(path) if not unwanted(record))
  if kept != path.read_bytes():
    write_atomic(path, kept)
