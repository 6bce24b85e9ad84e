"""What the TFDS builders share: build once, atomically, whole or not at all; find and open what was
built.

A directory holds one data set, with its recipe (what it was made from) beside it in `recipe.json`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pathlib
import shutil
from typing import Any

from absl import logging
from array_record.python import array_record_data_source
import tensorflow_datasets as tfds
import tqdm

from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic

_RECIPE = "recipe.json"
_SHARD_BYTES = 128 << 20  # TFDS holds one shard's examples in memory while it writes it


class SequentialBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
  """Examples in the order of `examples()`, cut into shards of equal length; memory is one shard's
  at most.

  Subclasses give `features`, `count`, `example_bytes` and `examples()` on construction-time data
  only.
  """

  VERSION = tfds.core.Version("1.0.0")
  # nothing is downloaded; TFDS' own look-up needs importlib_resources, which it does not install
  url_infos = None
  count: int
  example_bytes: int

  def features(self) -> dict[str, Any]:
    raise NotImplementedError

  def examples(self) -> Iterator[dict[str, Any]]:
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(self.features())
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, Sequence[Any]]:
    del dl_manager  # nothing is ever downloaded
    per_shard = max(1, min(self.count, _SHARD_BYTES // self.example_bytes))
    # One stream runs through all shards: sources that only read forward (video files) are read
    # once.
    stream = self._stream()
    shards = math.ceil(self.count / per_shard)
    return {"train": [functools.partial(itertools.islice, stream, per_shard)] * shards}

  def _stream(self) -> Iterator[tuple[int, dict[str, Any]]]:
    with tqdm.tqdm(desc=self.name, total=self.count, unit="clip", smoothing=0) as bar:
      for index, example in enumerate(self.examples()):
        bar.update()
        if bar.n == self.count:
          bar.close()
        yield index, example


def tensor(shape: tuple[int, ...], dtype: Any) -> tfds.features.Tensor:
  """A feature stored as raw bytes: a tenth of the size and of the parsing time of TFDS' lists of
  int64.
  """
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def is_complete(directory: str | os.PathLike) -> bool:
  return _find(directory) is not None


def check_recipe(
  directory: str | os.PathLike, recipe: dict[str, Any], ignore: tuple[str, ...] = ()
) -> None:
  """Ensures that what lies in `directory` was made from `recipe`; an empty or missing directory is
  fine.

  Raises:
    UserError: another recipe's data set (or part of one) is there; names the first field that
    differs.
  """
  found = read_recipe(directory)
  if found is None:
    return
  wanted = json.loads(json.dumps(recipe))
  for field in wanted | found:
    if field not in ignore and found.get(field) != wanted.get(field):
      raise UserError(
        f"{directory} holds a data set made with {field}={found.get(field)!r}, but this run wants "
        f"{field}={wanted.get(field)!r}; use another directory, or delete it to build the data "
        "set anew"
      )


def read_recipe(directory: str | os.PathLike) -> dict[str, Any] | None:
  """The recipe in a directory, None where there is none yet."""
  path = pathlib.Path(directory) / _RECIPE
  return json.loads(path.read_text()) if path.exists() else None


def write_recipe(directory: str | os.PathLike, recipe: dict[str, Any]) -> None:
  write_atomic(pathlib.Path(directory) / _RECIPE, json.dumps(recipe, indent=2).encode())


def build(
  builder: type[SequentialBuilder], config: tfds.core.BuilderConfig, directory: str | os.PathLike
) -> None:
  """Writes the whole data set under a temporary name, then gives it its own. Killed anywhere, it
  starts over.

  Raises:
    UserError: the disk refused the records, or took fewer than were written (a full disk).
  """
  _remove_leftovers(directory)
  try:
    with _quiet_tfds():
      made = builder(data_dir=os.fspath(directory), config=config)
      made.download_and_prepare(file_format="array_record")
  except (OSError, RuntimeError) as error:
    # how array_record reports a failed write
    if isinstance(error, RuntimeError) and "array_record" not in str(error):
      raise
    raise UserError(
      f"writing the data set to {directory} failed ({error}); free some space and run again"
    ) from error
  finally:
    _remove_leftovers(directory)
  split = made.info.splits["train"]
  arrived = _count_records([os.path.join(made.data_dir, name) for name in split.filenames])
  if arrived != split.num_examples:
    shutil.rmtree(made.data_dir)
    raise UserError(
      f"only {arrived} of {split.num_examples} records reached {directory}; is the disk full? "
      "free some space and "
      "run again"
    )


def open_source(directory: str | os.PathLike) -> Sequence[dict[str, Any]]:
  """Random access to the records of the data set in `directory`: a dict of arrays each, texts as
  bytes.

  Raises:
    UserError: no complete data set is there.
  """
  path = _find(directory)
  if path is None:
    raise UserError(f"{directory} holds no complete data set; run the stage that writes it first")
  return tfds.builder_from_directory(path).as_data_source(split="train")


def _find(directory: str | os.PathLike) -> pathlib.Path | None:
  """The one finished data set below a directory: name/version or name/config/version, as TFDS lays
  them out.
  """
  root = pathlib.Path(directory)
  infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
  done = [info.parent for info in infos if not info.parent.name.startswith("incomplete.")]
  if len(done) > 1:
    raise UserError(
      f"{directory} holds {len(done)} data sets, expected one; give each its own directory"
    )
  return done[0] if done else None


def _count_records(paths: list[str]) -> int:
  """Records that can be found in the files; 0 where a file has no end."""
  try:
    return len(array_record_data_source.ArrayRecordDataSource(paths))
  except (ValueError, RuntimeError, OSError):
    return 0


def _remove_leftovers(directory: str | os.PathLike) -> None:
  """Half-written data sets of runs that were stopped, and the empty download folder that TFDS
  makes.
  """
  root = pathlib.Path(directory)
  for path in [*root.glob("*/incomplete.*"), *root.glob("*/*/incomplete.*")]:
    shutil.rmtree(path, ignore_errors=True)
  for name in ("downloads/extracted", "downloads"):
    with contextlib.suppress(OSError):
      (root / name).rmdir()


@contextlib.contextmanager
def _quiet_tfds():
  """TFDS talks of downloads, and its bars count shards; ours counts clips."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)
