"""TFDS data sets: builds one once and atomically, finds it and opens it.

A directory holds one data set, with its recipe (the settings it was made from) in `recipe.json`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
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

from hiar_jax.checkpoints import owners
from hiar_jax.errors import UserError
from hiar_jax.files import DiskFull, is_disk_full, read_object, write_atomic

_RECIPE = "recipe.json"
# fields of a recipe that are known once the examples have been found (data.parts, video folders)
OF_PARTS = ("files", "total", "part_size")
# of earlier versions: where a folder of videos lay, which may be moved
_FORMER = ("folder",)
_SHARD_BYTES = 128 << 20  # TFDS holds one shard's examples in memory while it writes it

owners.allow_nameless()


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
  """The TFDS builder of `build`: examples in order in shards of equal length, one in memory."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded; TFDS's own look-up needs importlib_resources, which it does not install.
  url_infos = None

  def __init__(self, name, features, examples, count, example_bytes, **options):
    # Before TFDS's own constructor, which asks for the name and for the features.
    self.name = name
    self._features, self._examples = features, examples
    self._count, self._example_bytes = count, example_bytes
    super().__init__(**options)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(self._features)
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, Sequence[Any]]:
    del dl_manager  # nothing is downloaded
    per_shard = max(1, min(self._count, _SHARD_BYTES // self._example_bytes))
    shards = math.ceil(self._count / per_shard)
    # All shards slice one iterator, in order: video files, which only read forward, are decoded
    # once.
    numbered = self._numbered_examples()
    return {"train": [functools.partial(itertools.islice, numbered, per_shard)] * shards}

  def _numbered_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    with tqdm.tqdm(desc=self.name, total=self._count, unit="clip", smoothing=0) as bar:
      for index, example in enumerate(self._examples):
        bar.update()
        # islice does not ask for the end after the last example: close the bar before it.
        if bar.n == self._count:
          bar.close()
        yield index, example


def tensor(shape: tuple[int, ...], dtype: Any) -> tfds.features.Tensor:
  """Returns a feature stored as raw bytes: 10 % of the size and parsing time of lists of int64."""
  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


def is_complete(directory: str | os.PathLike) -> bool:
  """Returns True if a finished data set is in `directory`."""
  return _find(directory) is not None


def check_recipe(
  directory: str | os.PathLike, recipe: dict[str, Any], ignore: tuple[str, ...] = ()
) -> None:
  """Ensures that the data set in `directory`, if any, was made from `recipe`.

  Raises:
    UserError: another recipe's data set (or part of one) is there; names the first field that
      differs.
  """
  found = read_recipe(directory)
  if found is None:
    return
  wanted = json.loads(json.dumps(recipe))  # tuples -> lists, as in the file
  for field in wanted | found:
    if field not in (*ignore, *_FORMER) and found.get(field) != wanted.get(field):
      raise UserError(
        f"{directory} holds a data set made with {field}={found.get(field)!r}, but this run wants "
        f"{field}={wanted.get(field)!r}; use another directory, or delete it to build the data set "
        "again"
      )


def read_recipe(directory: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the recipe in a directory, None if there is none yet. Raises Damaged."""
  path = pathlib.Path(directory) / _RECIPE
  if not path.exists():
    return None
  return read_object(path, f"restore it, or delete {directory} to build the data set again")


def write_recipe(directory: str | os.PathLike, recipe: dict[str, Any]) -> None:
  write_atomic(pathlib.Path(directory) / _RECIPE, json.dumps(recipe, indent=2).encode())


def build(
  directory: str | os.PathLike,
  name: str,
  features: dict[str, Any],
  examples: Iterable[dict[str, Any]],
  *,
  count: int,
  example_bytes: int,
) -> None:
  """Writes a whole data set, in the order of its examples, under a temporary name and then renames
  it; no resumption.

  Args:
    name: of the data set and of its variant, as "shapes_clips/plain".
    features: TFDS features by name.
    examples: {feature: value} each; iterated over once, while they are written.
    count: of the examples.
    example_bytes: of a typical example; decides how many go into a shard.

  Raises:
    UserError: writing failed, or fewer records than were written are on the disk (a full disk).
  """
  name, variant = name.split("/")
  _remove_leftovers(directory)
  try:
    with _quiet_tfds():
      made = _Builder(
        name,
        features,
        examples,
        count,
        example_bytes,
        data_dir=os.fspath(directory),
        config=tfds.core.BuilderConfig(name=variant),
      )
      made.download_and_prepare(file_format="array_record")
  except (OSError, RuntimeError) as error:
    if is_disk_full(error):
      needed = count * example_bytes
      raise DiskFull(directory, needed, "no data set is left half made", error) from error
    # array_record reports a failed write as a RuntimeError that names its source file.
    if isinstance(error, RuntimeError) and "array_record" not in str(error):
      raise
    raise UserError(
      f"writing the data set to {directory} failed ({error}); free some space and run again"
    ) from error
  finally:
    _remove_leftovers(directory)
  # On a full disk array_record's writer may lose its last chunks without an error: count.
  split = made.info.splits["train"]
  paths = [os.path.join(made.data_dir, name) for name in split.filenames]
  try:
    written = len(array_record_data_source.ArrayRecordDataSource(paths))
  except (ValueError, RuntimeError, OSError):  # a file without its footer
    written = 0
  if written != split.num_examples:
    shutil.rmtree(made.data_dir)
    raise UserError(
      f"only {written} of {split.num_examples} records reached {directory}; is the disk full? "
      "free some space and run again"
    )


def open_source(
  directory: str | os.PathLike, keys: Collection[str] | None = None
) -> Sequence[dict[str, Any]]:
  """Opens the data set in `directory` for random access to its records: dicts of arrays, texts as
  bytes.

  keys: the features to decode, by default all; the others stay bytes.

  Raises:
    UserError: no complete data set is there.
  """
  path = _find(directory)
  if path is None:
    raise UserError(f"{directory} holds no complete data set; run the stage that writes it first")
  builder = tfds.builder_from_directory(path)
  skipped = builder.info.features.keys() - set(keys) if keys is not None else ()
  return builder.as_data_source(
    split="train", decoders={key: tfds.decode.SkipDecoding() for key in skipped}
  )


def _find(directory: str | os.PathLike) -> pathlib.Path | None:
  """Returns the folder of the one finished data set below a directory, None if there is none."""
  root = pathlib.Path(directory)
  # TFDS's layout: name/version, or name/config/version.
  infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
  done = [info.parent for info in infos if not info.parent.name.startswith("incomplete.")]
  if len(done) > 1:
    raise UserError(
      f"{directory} holds {len(done)} data sets, expected one; give each its own directory"
    )
  return done[0] if done else None


def _remove_leftovers(directory: str | os.PathLike) -> None:
  """Removes unfinished data sets of stopped runs, and the empty download folder that TFDS makes."""
  root = pathlib.Path(directory)
  for path in [*root.glob("*/incomplete.*"), *root.glob("*/*/incomplete.*")]:
    shutil.rmtree(path, ignore_errors=True)
  for name in ("downloads/extracted", "downloads"):
    with contextlib.suppress(OSError):  # missing, or with files of the user
      (root / name).rmdir()


@contextlib.contextmanager
def _quiet_tfds():
  """Silences TFDS's notes of downloads and its bars, which count shards; ours counts clips."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)
