"""From a directory to batches: any of the data sets, shuffled, sharded by process, resumable to the
batch.

The order is that of the global batch: it depends on the seed and the global batch size, not on how
many processes share the work, nor on the number of reading threads.
"""

from collections.abc import Callable, Mapping, Sequence
import os
import pathlib
from typing import Any

import grain
import numpy as np

from hiar_jax.data import tfds_builder
from hiar_jax.errors import UserError


def make_iterator(
  directory: str | os.PathLike,
  *,
  batch_size: int,
  seed: int,
  tokenize: Callable[[Mapping[str, Any]], np.ndarray],
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  prefetch: int = 8,
  keys: Sequence[str] | None = None,
) -> grain.DatasetIterator:
  """An endless iterator over dicts of arrays: each array feature as [b, ...], and "tokens" [b,
  ...], what `tokenize` makes of a record.

  Every epoch is a permutation of the data set; epochs follow each other without a break, so a batch
  may hold the end of one and the start of the next. `get_state()` and `set_state()` resume exactly.
  float16 storage arrives as float32.

  Args:
    batch_size: of this process; the global batch is batch_size * process_count.
    tokenize: record -> what the model reads of its caption, an array of the same shape for every
    record.
    keys: the array features wanted, all by default.

  Raises:
    UserError: nothing there, fewer records than the global batch, or a feature that the data set
    lacks.
  """
  source = tfds_builder.open_source(directory)
  global_batch = batch_size * process_count
  if batch_size < 1 or len(source) < global_batch:
    raise UserError(
      f"{directory} holds {len(source)} clips, but a batch takes {global_batch}; use batches of 1 "
      "to "
      f"{len(source)}, or write more clips"
    )
  reader = _Reader(
    source, tokenize, slice(process_index * batch_size, (process_index + 1) * batch_size), keys
  )
  reader.check(directory)
  order = grain.MapDataset.range(len(source)).shuffle(seed=_seed32(seed)).repeat()
  batches = order.batch(global_batch).map(reader)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
  )
  return iter(batches.to_iter_dataset(options))


class _Reader:
  """Record numbers of a global batch -> this process' rows of it."""

  def __init__(
    self, source: Sequence[Mapping[str, Any]], tokenize, rows: slice, keys: Sequence[str] | None
  ):
    self._source, self._tokenize, self._rows = source, tokenize, rows
    self._available = [k for k in source[0] if k != "caption"]
    self._keys = list(keys) if keys is not None else self._available

  def check(self, directory: str | os.PathLike) -> None:
    missing = [k for k in self._keys if k not in self._available]
    if missing:
      raise UserError(
        f"{directory} has no {', '.join(missing)}; it has {', '.join(self._available)}"
      )

  def __call__(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
    records = self._source.__getitems__([int(i) for i in numbers[self._rows]])
    batch = {key: _stack([r[key] for r in records]) for key in self._keys}
    return {**batch, "tokens": np.stack([self._tokenize(record) for record in records])}


def read_captions(directory: str | os.PathLike) -> list[str]:
  """The caption of every record of a data set, in its order.

  Raises:
    UserError: no complete data set is there.
  """
  source = tfds_builder.open_source(directory)
  return [source[i]["caption"].decode() for i in range(len(source))]


def read_starts(directory: str | os.PathLike) -> list[int]:
  """The frame of its video at which every clip of a data set begins, 0 where the data set does not
  say.
  """
  source = tfds_builder.open_source(directory)
  return [int(source[i].get("start", 0)) for i in range(len(source))]


def read_prompts(path: str | os.PathLike) -> list[str]:
  """One prompt a line; blank lines and lines that start with # are left out.

  Raises:
    UserError: no such file, not UTF-8 text, or no prompt in it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"prompts file {path} does not exist; write one prompt a line into it")
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
  except UnicodeDecodeError as error:
    raise UserError(
      f"prompts file {path} is not UTF-8 text ({error}); save it as UTF-8, one prompt a line"
    ) from error
  prompts = [line for line in lines if line and not line.startswith("#")]
  if not prompts:
    raise UserError(f"prompts file {path} holds no prompt; write one a line (# starts a comment)")
  return prompts


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
  stacked = np.stack(arrays)
  return stacked.astype(np.float32) if stacked.dtype == np.float16 else stacked


def _seed32(seed: int) -> int:
  """Grain takes 32 bits."""
  return int(np.random.SeedSequence(seed).generate_state(1)[0])
