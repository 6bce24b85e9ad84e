"""Teacher ODE trajectories: computed in resumable parts, then joined into one TFDS data set.

A trajectory holds the teacher's latents of one clip at the student's noise levels, noisiest first,
[s, f, h, w, c]; causal init regresses on it. A record is {trajectory, start int32 [], caption}: the
start and the caption are that clip's. Parts may be computed by several hosts over a shared file
system; one of them then calls `finish`.
"""

from collections.abc import Sequence
import io
import os
import pathlib
import shutil
from typing import Any
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.data import tfds_builder
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import write_atomic

_PARTS = "parts"


class TrajectoryWriter:
  """Collects `total` trajectories at `sigmas` (noisiest first) in parts of `part_size`; the last
  part may be shorter.

  recipe: other settings that the trajectories depend on (guidance, seed, teacher step), as JSON
  values; stored, and compared when the same directory is opened again.

  Raises:
    UserError: counts below 1, another dtype than float32 or float16, or the directory holds
      trajectories of other settings.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    sigmas: Sequence[float],
    total: int,
    part_size: int,
    dtype: str = "float32",
    recipe: dict[str, Any] | None = None,
  ):
    if total < 1 or part_size < 1:
      raise UserError(
        f"{total} trajectories in parts of {part_size} asked for; both must be at least 1"
      )
    if dtype not in ("float32", "float16"):
      raise UserError(f"trajectories stored as {dtype!r} asked for; use 'float32' or 'float16'")
    self.directory = pathlib.Path(directory)
    self.sigmas = [float(s) for s in sigmas]
    self.total = total
    self.part_size = part_size
    self.dtype = dtype
    self.parts = -(-total // part_size)  # rounded up
    fields = {
      "kind": "trajectories",
      "sigmas": self.sigmas,
      "total": total,
      "part_size": part_size,
      "dtype": dtype,
    }
    fields |= recipe or {}
    tfds_builder.check_recipe(directory, fields)
    if tfds_builder.read_recipe(directory) is None:
      tfds_builder.write_recipe(directory, fields)

  @property
  def complete(self) -> bool:
    """True once `finish` has built the data set."""
    return tfds_builder.is_complete(self.directory)

  def rows(self, index: int) -> range:
    """Returns the indices, among the `total` trajectories, of part `index`."""
    return range(index * self.part_size, min(self.total, (index + 1) * self.part_size))

  def missing_parts(self, process_index: int = 0, process_count: int = 1) -> list[int]:
    """Returns the parts that this process has still to compute, in order; none once complete."""
    if self.complete:  # `finish` has removed the parts
      return []
    return [
      i for i in range(process_index, self.parts, process_count) if not self._part(i).exists()
    ]

  def write_part(
    self,
    index: int,
    latents: np.ndarray,
    captions: Sequence[str],
    starts: Sequence[int] | None = None,
  ) -> None:
    """Writes part `index` atomically.

    Args:
      latents: [m, s, f, h, w, c] with m = len(rows(index)).
      captions: m texts.
      starts: m frame indices, default 0.

    Raises:
      ValueError: shapes that don't fit the part (a bug of the caller).
      UserError: values that are not finite in the storage dtype.
    """
    expected = (len(self.rows(index)), len(self.sigmas))
    if latents.ndim != 6 or latents.shape[:2] != expected or len(captions) != expected[0]:
      raise ValueError(
        f"part {index} needs latents {expected} + [f, h, w, c] and {expected[0]} captions, got "
        f"{latents.shape} and {len(captions)}"
      )
    with np.errstate(over="ignore"):  # float16 overflows above 65504: reported as an error below
      latents = np.asarray(latents).astype(self.dtype)
    if not np.isfinite(latents).all():
      raise UserError(
        f"the teacher's trajectories {self.rows(index)} are not finite as {self.dtype}; the "
        "teacher has diverged, or its latents need float32"
      )
    starts = np.zeros(len(captions), np.int32) if starts is None else np.asarray(starts, np.int32)
    content = io.BytesIO()
    np.savez(content, latents=latents, captions=np.array(captions, dtype=np.str_), starts=starts)
    write_atomic(self._part(index), content.getvalue())

  def finish(self) -> None:
    """Builds the data set from all parts, then removes them; may be called again after a stop.

    Raises:
      ValueError: parts are missing.
      UserError: a part is damaged (it is removed, so that the next run computes it again), or the
        disk is full.
    """
    if not self.complete:
      if missing := self.missing_parts():
        raise ValueError(f"trajectory parts {missing} are missing")
      paths = [self._part(i) for i in range(self.parts)]
      shape, dtype = _read_part(paths[0])[0].shape[1:], np.dtype(self.dtype)
      features = {
        "trajectory": tfds_builder.tensor(shape, dtype),
        "start": tfds_builder.tensor((), np.int32),
        "caption": tfds.features.Text(),
      }
      tfds_builder.build(
        self.directory,
        f"trajectories/{self.dtype}",
        features,
        (
          {"trajectory": trajectory, "start": start, "caption": caption}
          for path in paths  # one part in memory at a time
          for trajectory, caption, start in zip(*_read_part(path), strict=True)
        ),
        count=self.total,
        example_bytes=int(np.prod(shape)) * dtype.itemsize,
      )
    # Outside of the condition: a run killed between the two steps leaves parts behind.
    shutil.rmtree(self.directory / _PARTS, ignore_errors=True)

  def _part(self, index: int) -> pathlib.Path:
    return self.directory / _PARTS / f"part-{index:05d}-of-{self.parts:05d}.npz"


def read_sigmas(directory: str | os.PathLike) -> list[float]:
  """Returns the noise levels of the trajectories in a directory, noisiest first.

  Raises:
    UserError: no trajectories there.
  """
  recipe = tfds_builder.read_recipe(directory) or {}
  if recipe.get("kind") != "trajectories":
    raise UserError(f"{directory} holds no trajectories; run the trajectories stage first")
  return recipe["sigmas"]


def check_sigmas(directory: str | os.PathLike, sigmas: Sequence[float]) -> None:
  """Ensures that the stored trajectories are at the noise levels that the student uses.

  Raises:
    UserError: other levels, or no trajectories there.
  """
  stored = read_sigmas(directory)
  wanted = np.asarray(sigmas, np.float64)
  # Levels may have passed through float32: 1e-6 covers its rounding.
  if len(stored) != len(sigmas) or not np.allclose(stored, wanted, rtol=0, atol=1e-6):
    listed = [", ".join(f"{sigma:.4f}" for sigma in levels) for levels in (stored, sigmas)]
    raise UserError(
      f"{directory} holds trajectories at sigmas {listed[0]}, but the student uses {listed[1]}; "
      "compute them again in another directory"
    )


def _read_part(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (latents [m, s, f, h, w, c], captions [m], starts [m]); removes a damaged file."""
  try:
    with open(path, "rb") as file, np.load(file) as part:
      return part["latents"], part["captions"], part["starts"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    path.unlink(missing_ok=True)
    raise Damaged(path, error, "it was removed; the same command computes it again") from error
