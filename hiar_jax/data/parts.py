"""Clips in latent form: computed in resumable parts, then joined into one TFDS data set.

A record is {<key>, start int32 [], caption}: the start and the caption are those of the clip. Parts
may be computed by several hosts over a shared file system; one of them then calls `finish`.
"""

from collections.abc import Sequence
import io
import os
import pathlib
import shutil
from typing import Any, ClassVar
import zipfile

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.data import tfds_builder
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import write_atomic

_PARTS = "parts"


class PartWriter:
  """Collects `total` records in parts of `part_size`; the last part may be shorter.

  recipe: other settings that the records depend on, as JSON values; stored, and compared when the
  same directory is opened again.

  A subclass says what it collects: kind, its name; key, that of the array in a record; dtypes that
  it may be stored in; not_finite, what such values may come from.

  Raises:
    UserError: counts below 1, another dtype, or the directory holds records of other settings.
  """

  key: ClassVar[str]
  kind: ClassVar[str]
  dtypes: ClassVar[tuple[str, ...]]
  not_finite: ClassVar[str]
  axes: tuple[int, ...] = ()  # the sizes of a record's axes before [f h w c]

  def __init__(
    self,
    directory: str | os.PathLike,
    total: int,
    part_size: int,
    dtype: str,
    recipe: dict[str, Any],
  ):
    if total < 1 or part_size < 1:
      raise UserError(
        f"{total} {self.kind} in parts of {part_size} asked for; both must be at least 1"
      )
    if dtype not in self.dtypes:
      allowed = " or ".join(map(repr, self.dtypes))
      raise UserError(f"{self.kind} stored as {dtype!r} asked for; use {allowed}")
    self.directory = pathlib.Path(directory)
    self.total = total
    self.part_size = part_size
    self.dtype = dtype
    self.parts = -(-total // part_size)  # rounded up
    fields = {
      "kind": self.kind,
      **recipe,
      "total": total,
      "part_size": part_size,
      "dtype": dtype,
    }
    tfds_builder.check_recipe(directory, fields)
    if tfds_builder.read_recipe(directory) is None:
      tfds_builder.write_recipe(directory, fields)

  @property
  def complete(self) -> bool:
    """True once `finish` has built the data set."""
    return tfds_builder.is_complete(self.directory)

  def rows(self, index: int) -> range:
    """Returns the indices, among the `total` records, of part `index`."""
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
      latents: [m ...] with m = len(rows(index)).
      captions: m texts.
      starts: m frame indices, default 0.

    Raises:
      ValueError: shapes that don't fit the part (a bug of the caller).
      UserError: values that are not finite in the storage dtype.
    """
    expected = (len(self.rows(index)), *self.axes)
    if latents.ndim != len(expected) + 4 or latents.shape[: len(expected)] != expected:
      raise ValueError(f"part {index} needs latents {expected} + [f, h, w, c], got {latents.shape}")
    if len(captions) != len(self.rows(index)):
      raise ValueError(f"part {index} needs {len(self.rows(index))} captions, got {len(captions)}")
    with np.errstate(over="ignore"):  # float16 overflows above 65504: reported as an error below
      latents = np.asarray(latents).astype(jnp.dtype(self.dtype))
    if not np.isfinite(latents).all():
      raise UserError(
        f"the {self.kind} {self.rows(index)} are not finite as {self.dtype}; {self.not_finite}"
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
        raise ValueError(f"{self.kind}: parts {missing} are missing")
      paths = [self._part(i) for i in range(self.parts)]
      shape, dtype = _read_part(paths[0], self.dtype)[0].shape[1:], jnp.dtype(self.dtype)
      features = {
        self.key: tfds_builder.tensor(shape, dtype),
        "start": tfds_builder.tensor((), np.int32),
        "caption": tfds.features.Text(),
      }
      tfds_builder.build(
        self.directory,
        f"{self.kind}/{self.dtype}",
        features,
        (
          {self.key: latents, "start": start, "caption": caption}
          for path in paths  # one part in memory at a time
          for latents, caption, start in zip(*_read_part(path, self.dtype), strict=True)
        ),
        count=self.total,
        example_bytes=int(np.prod(shape)) * dtype.itemsize,
      )
    # Outside of the condition: a run killed between the two steps leaves parts behind.
    shutil.rmtree(self.directory / _PARTS, ignore_errors=True)

  def _part(self, index: int) -> pathlib.Path:
    return self.directory / _PARTS / f"part-{index:05d}-of-{self.parts:05d}.npz"


def _read_part(path: pathlib.Path, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (latents [m ...], captions [m], starts [m]); removes a damaged file."""
  try:
    with open(path, "rb") as file, np.load(file) as part:
      # NumPy's files hold bfloat16 as two bytes without a type
      return part["latents"].view(jnp.dtype(dtype)), part["captions"], part["starts"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    path.unlink(missing_ok=True)
    raise Damaged(path, error, "it was removed; the same command computes it again") from error
