"""Batches of a data set: shuffled, sharded by process, resumable to the batch.

The order is that of the global batch: it depends on the seed and the global batch size, not on the
number of processes that share the work or of reading threads.

A record of a folder of videos is a piece of film with several windows (data.video_folder). Each
time that one is read, one of its windows is drawn, by the seed and the place in the order.
"""

from collections.abc import Callable, Mapping, Sequence
import os
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
  """Returns an endless iterator over batches {array feature: [b, ...], "tokens": [b, ...]}.

  Every epoch is a permutation of the data set; epochs follow each other without a break, so a batch
  may hold the end of one and the start of the next. `get_state()` and `set_state()` resume exactly.
  Storage of 16 bits (float16, bfloat16) arrives as float32.

  Args:
    batch_size: of this process; the global batch is batch_size * process_count.
    tokenize: record -> "tokens", an array of the same shape for every record.
    keys: the array features wanted, all by default.

  Raises:
    UserError: no data set, fewer clips than the global batch, or a feature that the data set
      lacks.
  """
  source = tfds_builder.open_source(directory)
  global_batch = batch_size * process_count
  clips = len(source) if len(source) >= global_batch else count_clips(directory)
  if batch_size < 1 or clips < global_batch:
    raise UserError(
      f"{directory} holds {clips} clips, but a batch takes {global_batch}; use batches of 1 "
      f"to {clips} (as --config.teacher.batch, in a new workdir), or write more clips"
    )
  pieces = WINDOWS in source[0]
  available = [key for key in source[0] if key not in ("caption", WINDOWS)]
  if missing := [key for key in keys or () if key not in available]:
    raise UserError(f"{directory} has no {', '.join(missing)}; it has {', '.join(available)}")
  rows = slice(process_index * batch_size, (process_index + 1) * batch_size)

  def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Maps the record numbers of a global batch to this process's rows of it."""
    # One call for all records: array_record reads them in parallel.
    mine = numbers[rows]
    if pieces:
      records = source.__getitems__([int(i) for i in mine[:, 0]])
      records = [window(record, draw) for record, draw in zip(records, mine[:, 1], strict=True)]
    else:
      records = source.__getitems__([int(i) for i in mine])
    batch = {}
    for key in available if keys is None else keys:
      stacked = np.stack([record[key] for record in records])
      short = stacked.dtype.name in ("float16", "bfloat16")
      batch[key] = stacked.astype(np.float32) if short else stacked
    return {**batch, "tokens": np.stack([tokenize(record) for record in records])}

  # Grain takes seeds of 32 bits; SeedSequence hashes longer ones down.
  seed32 = int(np.random.SeedSequence(seed).generate_state(1)[0])
  # Numbers are shuffled and batched for all processes alike, and only then does each process read
  # its own rows: the global order is independent of the number of processes.
  order = grain.MapDataset.range(len(source)).shuffle(seed=seed32).repeat()
  if pieces:
    # the generator is grain's, of the seed and the place in the endless order
    order = order.random_map(lambda i, rng: np.asarray([i, rng.integers(DRAWS)]), seed=seed32)
  batches = order.batch(global_batch).map(read)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
  )
  return iter(batches.to_iter_dataset(options))


WINDOWS = "windows"  # the field of a piece of film: how many windows it has
DRAWS = 2**40  # a number below picks a window, all about as often


def window(record: Mapping[str, Any], draw: int) -> dict[str, Any]:
  """Returns the clip of a record: of a piece of film the window that a number picks, else all."""
  if WINDOWS not in record:
    return dict(record)
  first, frames = int(draw) % int(record[WINDOWS]), (len(record["video"]) + 1) // 2
  video = record["video"][first : first + frames]
  rest = {name: value for name, value in record.items() if name != WINDOWS}
  return {**rest, "video": video, "start": np.int32(record["start"] + first)}


def count_clips(directory: str | os.PathLike) -> int:
  """Returns the number of clips of a data set: of pieces of film, their windows."""
  source = tfds_builder.open_source(directory, (WINDOWS,))
  if WINDOWS not in source[0]:
    return len(source)
  return sum(int(source[i][WINDOWS]) for i in range(len(source)))


def spread(items: Sequence, count: int) -> list:
  """Returns `count` items, evenly spread; all of them where there are no more."""
  count = min(count, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def read_captions(directory: str | os.PathLike) -> list[str]:
  """Returns the caption of every record of a data set, in its order.

  Raises:
    UserError: no complete data set is there.
  """
  source = tfds_builder.open_source(directory, ("caption",))
  return [source[i]["caption"].decode() for i in range(len(source))]


def read_starts(directory: str | os.PathLike, seed: Sequence[int] = (0,)) -> list[int]:
  """Returns the frame of its video at which each clip of a data set begins, 0 by default; of a
  piece of film, that of a window drawn by the seed.
  """
  source = tfds_builder.open_source(directory, ("start", WINDOWS))
  draws = np.random.default_rng(seed).integers(DRAWS, size=len(source))
  records = (source[i] for i in range(len(source)))
  return [
    int(record.get("start", 0)) + int(draw) % int(record.get(WINDOWS, 1))
    for record, draw in zip(records, draws, strict=True)
  ]
