"""What a run says about itself: scalars and sample frames to JSONL and TensorBoard, a progress bar.

A line of `metrics.jsonl` is {"stage": str, "step": int, "time": unix seconds, "scalars": {name:
number or null}}, or with "image": a PNG beside it, instead of "scalars".
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
  """Writes `<workdir>/logs/metrics.jsonl` and TensorBoard event files beside it, on process 0
  alone.

  `resume` first drops what a killed run wrote past the checkpoint that is being continued, so the
  file of a resumed run equals that of a straight run in everything but `time`.
  """

  def __init__(self, directory: str | os.PathLike):
    """Opens (and creates) `directory`, usually `<workdir>/logs`."""
    self.path = pathlib.Path(directory) / "metrics.jsonl"
    self._jsonl = self._board = None
    if is_writer():
      self.path.parent.mkdir(parents=True, exist_ok=True)
      _drop(self.path, lambda record: False)  # a torn last line, left by a kill
      self._jsonl = open(self.path, "a", encoding="utf-8")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def resume(self, stage: str, step: int) -> None:
    """Drops the lines of `stage` past `step`: training goes on from there and writes them again."""
    if self._jsonl is None:
      return
    self._jsonl.close()
    _drop(self.path, lambda record: record["stage"] == stage and record["step"] > step)
    self._jsonl = open(self.path, "a", encoding="utf-8")

  def scalars(self, stage: str, step: int, values: dict[str, Any]) -> None:
    """Writes one line, at once.

    Values are numbers or 0-d arrays; NaN and infinities become null.
    """
    if self._jsonl is None:
      return
    numbers = {name: _number(value) for name, value in values.items()}
    self._write(stage, step, {"scalars": numbers})
    for name, value in numbers.items():
      self._tensorboard().add_scalar(
        f"{stage}/{name}", math.nan if value is None else value, int(step)
      )

  def video(self, stage: str, step: int, name: str, clips: np.ndarray, columns: int = 8) -> None:
    """Writes clips [b, f, h, w, 3], uint8, as one image: a row a clip, `columns` of its frames."""
    if self._jsonl is not None:
      strip = film_strip(_uint8(clips, 5, "[b, f, h, w, 3]"), columns)
      path = self.path.parent / name / f"{stage}-{step:06d}.png"
      path.parent.mkdir(exist_ok=True)
      write_png(path, strip)
      self._write(stage, step, {"image": f"{name}/{path.name}"})
      self._tensorboard().add_image(f"{stage}/{name}", strip, int(step), dataformats="HWC")

  def _write(self, stage: str, step: int, content: dict[str, Any]) -> None:
    record = {"stage": stage, "step": int(step), "time": round(time.time(), 3), **content}
    self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
    self._jsonl.flush()

  def close(self) -> None:
    """Flushes and closes both; a closed writer ignores what it is given."""
    if self._jsonl is not None:
      self._jsonl.close()
    if self._board is not None:
      self._board.close()
    self._jsonl = self._board = None

  def _tensorboard(self) -> "tensorboardX.SummaryWriter":
    if self._board is None:  # opened late: an event file that holds nothing is noise
      self._board = _summary_writer()(str(self.path.parent), flush_secs=10)
    return self._board


def _summary_writer() -> type["tensorboardX.SummaryWriter"]:
  """Loaded without PyTorch, which it takes along wherever that is installed: seconds, for tensors
  that never come here.
  """
  hide = "torch" not in sys.modules
  if hide:
    sys.modules["torch"] = None
  try:
    import tensorboardX
  finally:
    if hide:
      del sys.modules["torch"]
  return tensorboardX.SummaryWriter


def film_strip(clips: np.ndarray, columns: int = 8) -> np.ndarray:
  """Clips [b, f, h, w, c] -> one image [b h, columns w, c] of frames spread evenly from the first
  to the last.
  """
  b, f, h, w, c = clips.shape
  picked = clips[:, np.linspace(0, f - 1, min(columns, f)).round().astype(int)]
  return picked.transpose(0, 2, 1, 3, 4).reshape(b * h, -1, c)


def read_log(path: str | os.PathLike, stage: str | None = None) -> list[dict]:
  """The records of a `metrics.jsonl`, of one stage if given, in the order written."""
  with open(path, encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  return [record for record in records if stage is None or record["stage"] == stage]


def _number(value: Any) -> int | float | None:
  """A JSON number: an int stays one, arrays of one element become numbers, NaN and infinities
  None.
  """
  value = np.asarray(value).item()
  return value if isinstance(value, int) or math.isfinite(value) else None


def _uint8(array: Any, rank: int, layout: str) -> np.ndarray:
  array = np.asarray(array)
  if array.dtype != np.uint8 or array.ndim != rank or array.shape[-1] != 3:
    raise ValueError(f"expected uint8 {layout}, got {array.dtype} {list(array.shape)}")
  return array


def _drop(path: pathlib.Path, unwanted: Callable[[dict], bool]) -> None:
  """Rewrites the file without the unwanted records and without a torn last line; untouched if there
  are none.
  """
  if not path.exists():
    return
  lines = path.read_bytes().splitlines(keepends=True)
  whole = [line for line in lines if line.endswith(b"\n")]
  kept = [line for line in whole if not unwanted(json.loads(line))]
  if kept != lines:
    write_atomic(path, b"".join(kept))
