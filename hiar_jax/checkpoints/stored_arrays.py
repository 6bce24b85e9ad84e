"""A tree of arrays as an Orbax checkpoint that is written and read piece by piece.

The tree is Orbax's, and Orbax can read it; the numbers of a leaf are a Zarr array whose chunks have
checksums, so that a changed bit is noticed when it is read. A tree may be larger than memory: views
of mapped files, and stacks that give one row at a time, are read a chunk at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
import contextlib
import errno
import hashlib
import itertools
import logging
import math
import os
import pathlib
from typing import Any
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from hiar_jax.errors import UserError
from hiar_jax.types import PyTree

CHUNK_BYTES = 64 << 20
IN_FLIGHT = 4  # chunks of that size in memory at once; of smaller ones as many more


class Damaged(Exception):
  """What is stored cannot be read back."""


class Cast:
  """An array, or a stack of rows, in another dtype; cast where it is read."""

  def __init__(self, base: Any, dtype: Any):
    self.base, self.dtype, self.shape, self.size = base, np.dtype(dtype), base.shape, base.size

  def __getitem__(self, row) -> np.ndarray:
    return np.asarray(self.base[row]).astype(self.dtype)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    return np.asarray(self.base).astype(dtype or self.dtype)


# -------------------------------------------------------------------------------------------- write


def write(directory: str | os.PathLike, tree: PyTree) -> str:
  """Writes nested dicts of arrays to a new directory; returns an id of their names, shapes, dtypes
  and numbers.

  A leaf may also be anything with shape, dtype and size whose rows are arrays: leaf[i].
  """
  handler = _Writer()
  registry = ocp.type_handlers.create_type_handler_registry(
    (_Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  format_ = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
  )
  leaves = jax.tree.map(_Leaf, tree)
  with _quiet(), ocp.Checkpointer(format_) as checkpointer:
    checkpointer.save(os.path.abspath(directory), args=ocp.args.PyTreeSave(leaves))
  lines = sorted(handler.sums)
  return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


class _Leaf:
  """What Orbax hands to _Writer as it is."""

  def __init__(self, array: Any):
    self.array, self.shape, self.dtype, self.size = (
      array,
      tuple(array.shape),
      np.dtype(array.dtype),
      array.size,
    )


class _Writer(ocp.type_handlers.NumpyHandler):
  """Writes leaves chunk by chunk, and sums them up."""

  def __init__(self):
    super().__init__()
    self.sums: list[str] = []

  async def serialize(self, values, infos, args=None) -> list:
    budget = _Budget(IN_FLIGHT * CHUNK_BYTES)

    async def write_one(leaf: _Leaf, info: ocp.type_handlers.ParamInfo) -> str:
      await info.await_path_creation()
      return (
        f"{info.name} {leaf.shape} {leaf.dtype.name} {await _write_leaf(info.path, leaf, budget)}"
      )

    # Flushing a file to the disk takes long however small it is: many at once.
    tasks = [
      asyncio.create_task(write_one(leaf, info)) for leaf, info in zip(values, infos, strict=True)
    ]
    try:
      self.sums += await asyncio.gather(*tasks)
    finally:
      for task in tasks:
        task.cancel()
    return []


class _Budget:
  """Bytes in memory at once, handed out in the order of asking."""

  def __init__(self, limit: int):
    self.left, self.limit, self.turn, self.freed = limit, limit, asyncio.Lock(), asyncio.Event()

  @contextlib.asynccontextmanager
  async def take(self, size: int) -> AsyncIterator[None]:
    size = min(size, self.limit)
    async with self.turn:
      while self.left < size:
        self.freed.clear()
        await self.freed.wait()
      self.left -= size
    try:
      yield
    finally:
      self.left += size
      self.freed.set()


async def _write_leaf(path: os.PathLike, leaf: _Leaf, budget: _Budget) -> list[int]:
  """-> the CRC-32 of each chunk."""
  chunk = chunk_shape(leaf.shape, leaf.dtype.itemsize, CHUNK_BYTES)
  spec = {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": f"{os.fspath(path)}/"},
    "create": True,
    "store_data_equal_to_fill_value": True,  # a chunk that is not there is one that was lost
    "metadata": {
      "shape": leaf.shape,
      "data_type": leaf.dtype.name,
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    },
  }
  store = await tensorstore.open(spec)

  async def write_piece(index: tuple[slice, ...]) -> int:
    piece = np.asarray(_take(leaf.array, index), order="C")
    await store[index].write(piece, can_reference_source_data_indefinitely=True)
    return zlib.crc32(piece.reshape(-1).view(np.uint8))

  sums = []
  for index in _pieces(leaf.shape, chunk):
    async with budget.take(math.prod(chunk) * leaf.dtype.itemsize):
      sums.append(await write_piece(index))
  return sums


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
  """The leading axes are cut until a chunk is no larger than `limit` bytes."""
  chunk = list(shape)
  for axis, size in enumerate(shape):
    rest = math.prod(shape[axis + 1 :]) * itemsize
    chunk[axis] = max(1, min(size, limit // max(rest, 1)))
    if chunk[axis] > 1 or rest <= limit:
      break
  return tuple(max(1, size) for size in chunk)


def _pieces(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
  """Chunks in order, as indices."""
  axes = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
  for corner in itertools.product(*axes):
    yield tuple(
      slice(at, min(at + step, size)) for at, step, size in zip(corner, chunk, shape, strict=True)
    )


def _take(array: Any, index: tuple[slice, ...]) -> np.ndarray:
  """A piece of an array; of a stack only the rows that it needs are read."""
  if isinstance(array, Cast):
    return _take(array.base, index).astype(array.dtype)
  if isinstance(array, jax.Array):
    array = np.asarray(array)  # once: it keeps its copy on the host
  if index and not isinstance(array, np.ndarray):
    first, *rest = index
    return np.stack([np.asarray(array[row])[tuple(rest)] for row in range(first.start, first.stop)])
  return np.asarray(array[index])


# --------------------------------------------------------------------------------------------- read


def shapes(directory: str | os.PathLike) -> PyTree:
  """The tree of jax.ShapeDtypeStructs. Raises Damaged."""
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer, _damage():
    tree = checkpointer.metadata(os.path.abspath(directory)).item_metadata.tree
    if not jax.tree.leaves(tree):
      raise Damaged("it holds no arrays")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read(directory: str | os.PathLike, abstract: PyTree) -> PyTree:
  """The arrays, with the dtypes and shardings of `abstract`, a tree of jax.ShapeDtypeStructs.
  Raises Damaged.

  Leaf by leaf, and of each what the devices of this process hold: on the host there is never more
  than a leaf.
  """
  return jax.tree.map(_place, open_tree(directory), abstract)


def _place(stored: "Stored", leaf: jax.ShapeDtypeStruct) -> jax.Array:
  parts: dict[str, np.ndarray] = {}

  def part(index: tuple[slice, ...]) -> np.ndarray:
    if str(index) not in parts:  # several devices may hold the same one
      parts[str(index)] = stored[index].astype(leaf.dtype, copy=False)
    return parts[str(index)]

  return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


class Stored:
  """An array on the disk: numpy.asarray reads all of it, an index a row or a part.

  Reading raises Damaged.
  """

  def __init__(self, path: str | os.PathLike):
    store = {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    # a lost chunk is no zeros
    spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
    with _damage():
      self._store = tensorstore.open(spec, read=True).result()
    self.shape, self.dtype = tuple(self._store.shape), self._store.dtype.numpy_dtype
    self.size = math.prod(self.shape)

  def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
    with _damage():
      return self._store[index].read().result()

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # it is read anew every time
    with _damage():
      return self._store.read().result().astype(dtype or self.dtype, copy=False)


def open_tree(directory: str | os.PathLike) -> PyTree:
  """The tree of Stored arrays. Raises Damaged."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return jax.tree_util.tree_map_with_path(
    lambda path, _: Stored(os.path.join(directory, name(path))), shapes(directory)
  )


@contextlib.contextmanager
def _damage() -> Iterator[None]:
  try:
    yield
  except Exception as error:  # what it raises depends on which file is damaged
    if isinstance(error, MemoryError | Damaged) or "RESOURCE_EXHAUSTED" in str(error):
      raise
    cause = error.__cause__ or error
    raise Damaged((str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]) from error


@contextlib.contextmanager
def disk_errors(path: pathlib.Path) -> Iterator[None]:
  """A full disk becomes one clear line (TensorStore says it in words only)."""
  try:
    yield
  except Exception as error:
    cause: BaseException | None = error
    while cause is not None:
      if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(
        cause
      ):
        raise UserError(
          f"no space left on the disk of {path}; free some space and run the same command"
        ) from error
      cause = cause.__cause__ or cause.__context__
    raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without Orbax's notes that there is nothing to merge and no device layout to keep."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
