"""Trees of arrays as Orbax checkpoints, written and read chunk by chunk.

Orbax can read the result. Each leaf is a Zarr v3 array whose chunks carry CRC-32C checksums, so a
changed bit raises on reading. A tree may be larger than memory: views of mapped files, and stacks
that give one row at a time, are read one chunk at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
import contextlib
import hashlib
import itertools
import logging
import math
import os
from typing import Any
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from hiar_jax.errors import Damaged
from hiar_jax.files import reading
from hiar_jax.types import PyTree

CHUNK_BYTES = 64 << 20
_ADVICE = "delete the folder of these weights and convert again"
IN_FLIGHT = 4  # chunks of that size in memory at once; of smaller ones proportionally more


class Cast:
  """An array, or a stack of rows, in another dtype; cast lazily, when it is read."""

  def __init__(self, base: Any, dtype: Any):
    self.base = base
    self.dtype = np.dtype(dtype)
    self.shape = tuple(base.shape)
    self.size = base.size

  def __getitem__(self, row) -> np.ndarray:
    return np.asarray(self.base[row]).astype(self.dtype, copy=False)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    return np.asarray(self.base).astype(dtype or self.dtype)


# -------------------------------------------------------------------------------------------- write


def write(directory: str | os.PathLike, tree: PyTree) -> str:
  """Writes nested dicts of arrays to a new directory; returns a 64-bit id of names and contents.

  The id depends on the names, shapes, dtypes and numbers. A leaf may also be any object with shape,
  dtype and size whose rows `leaf[i]` are arrays.
  """
  handler = _Writer()
  # Orbax knows no such type, so it hands each leaf to the handler without a copy or conversion.
  registry = ocp.type_handlers.create_type_handler_registry(
    (Cast, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  format_ = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
  )
  leaves = jax.tree.map(lambda leaf: Cast(leaf, leaf.dtype), tree)
  logger = logging.getLogger("absl")
  level = logger.level
  try:
    # Orbax warns that there is nothing to merge and no device layout to keep.
    logger.setLevel(logging.ERROR)
    with ocp.Checkpointer(format_) as checkpointer:
      checkpointer.save(os.path.abspath(directory), args=ocp.args.PyTreeSave(leaves))
  finally:
    logger.setLevel(level)
  # Sorted: the id must not depend on the order in which Orbax passes the leaves.
  return hashlib.blake2b("\n".join(sorted(handler.sums)).encode(), digest_size=8).hexdigest()


class _Writer(ocp.type_handlers.NumpyHandler):
  """Handler that writes leaves chunk by chunk and keeps a line with the checksums of each."""

  def __init__(self):
    super().__init__()
    self.sums: list[str] = []

  async def serialize(self, values, infos, args=None) -> list:
    budget = _Budget(IN_FLIGHT * CHUNK_BYTES)

    async def write_one(leaf: Cast, info: ocp.type_handlers.ParamInfo) -> str:
      await info.await_path_creation()
      checksums = await _write_leaf(info.path, leaf, budget)
      return f"{info.name} {leaf.shape} {leaf.dtype.name} {checksums}"

    # All leaves at once: a flush to disk has a fixed cost however small the file, and flushes
    # overlap. The budget bounds the memory.
    tasks = [
      asyncio.create_task(write_one(leaf, info)) for leaf, info in zip(values, infos, strict=True)
    ]
    try:
      self.sums += await asyncio.gather(*tasks)
    finally:
      # after the first failure no chunk is begun, and those that are being written end: whoever
      # catches it removes the folder, in which they would make files anew
      budget.close()
      await asyncio.gather(*tasks, return_exceptions=True)
    return []  # no futures: everything is on disk already


class _Budget:
  """Limit on the bytes in memory at once, granted first come, first served."""

  def __init__(self, limit: int):
    self.limit = limit
    self.left = limit
    self.queue = asyncio.Lock()
    self.freed = asyncio.Event()
    self.closed = False

  @contextlib.asynccontextmanager
  async def take(self, size: int) -> AsyncIterator[None]:
    size = min(size, self.limit)  # a chunk above the limit is written alone
    # Only the head of the queue waits for memory, so small requests cannot starve a large one.
    async with self.queue:
      while self.left < size:
        self.freed.clear()
        await self.freed.wait()
      if self.closed:
        raise asyncio.CancelledError
      self.left -= size
    try:
      yield
    finally:
      self.left += size
      self.freed.set()

  def close(self) -> None:
    """Grants no more: who waits, or asks from now on, is cancelled."""
    self.closed = True


async def _write_leaf(path: os.PathLike, leaf: Cast, budget: _Budget) -> list[int]:
  """Writes one leaf as a Zarr array; returns the CRC-32 of each chunk, in order."""
  chunk = chunk_shape(leaf.shape, leaf.dtype.itemsize, CHUNK_BYTES)
  spec = {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": f"{os.fspath(path)}/"},
    "create": True,
    # Chunks of zeros are stored too, so that an absent chunk always means a lost one.
    "store_data_equal_to_fill_value": True,
    "metadata": {
      "shape": leaf.shape,
      "data_type": leaf.dtype.name,
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    },
  }
  store = await tensorstore.open(spec)

  async def write_piece(index: tuple[slice, ...]) -> int:
    # Contiguous: the CRC below views the bytes, which must not depend on the source's strides.
    piece = np.asarray(_take(leaf, index), order="C")
    # `piece` is never changed, so TensorStore may use it without a copy.
    await store[index].write(piece, can_reference_source_data_indefinitely=True)
    return zlib.crc32(piece.reshape(-1).view(np.uint8))

  sums = []
  for index in _pieces(leaf.shape, chunk):
    async with budget.take(math.prod(chunk) * leaf.dtype.itemsize):
      sums.append(await write_piece(index))
  return sums


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int) -> tuple[int, ...]:
  """Returns the shape of chunks of at most `limit` bytes, cut along the leading axes.

  Chunks cut that way are contiguous in C order. One element may exceed the limit.
  """
  chunk = list(shape)
  for axis, size in enumerate(shape):
    rest = math.prod(shape[axis + 1 :]) * itemsize  # bytes of one index along this axis
    chunk[axis] = max(1, min(size, limit // max(rest, 1)))
    # Cut the next axis only where even a single index along this one is too large.
    if chunk[axis] > 1 or rest <= limit:
      break
  return tuple(max(1, size) for size in chunk)  # Zarr has no chunks of size 0


def _pieces(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
  """Yields the index of each chunk, in C order."""
  axes = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
  for corner in itertools.product(*axes):
    yield tuple(
      slice(start, min(start + step, size))
      for start, step, size in zip(corner, chunk, shape, strict=True)
    )


def _take(array: Any, index: tuple[slice, ...]) -> np.ndarray:
  """Returns a piece of an array; of a stack, only the rows in it are read."""
  if isinstance(array, Cast):
    return _take(array.base, index).astype(array.dtype, copy=False)
  if isinstance(array, jax.Array):
    array = np.asarray(array)  # one transfer: jax caches the copy on the host
  if index and not isinstance(array, np.ndarray):
    first, *rest = index
    return np.stack([np.asarray(array[row])[tuple(rest)] for row in range(first.start, first.stop)])
  return np.asarray(array[index])


# --------------------------------------------------------------------------------------------- read


def shapes(directory: str | os.PathLike) -> PyTree:
  """Returns the tree of jax.ShapeDtypeStructs. Raises Damaged."""
  with (
    ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    reading(directory, _ADVICE),
  ):
    tree = checkpointer.metadata(os.path.abspath(directory)).item_metadata.tree
    if not jax.tree.leaves(tree):
      raise Damaged(directory, "it holds no arrays", _ADVICE)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read(directory: str | os.PathLike, abstract: PyTree) -> PyTree:
  """Returns the arrays with the dtypes and shardings of `abstract`, a tree of ShapeDtypeStructs.

  Reads leaf by leaf, and of each only the parts that the devices of this process hold: the host
  never has more than one leaf. Raises Damaged.
  """

  def place(stored: Stored, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # Several devices may hold the same part (replicated axes): read it once. Slices have no hash
    # before Python 3.12, so the key is their text.
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
      if str(index) not in parts:
        parts[str(index)] = stored[index].astype(leaf.dtype, copy=False)
      return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

  return jax.tree.map(place, open_tree(directory), abstract)


class Stored:
  """An array on disk: numpy.asarray reads all of it, an index reads a row or a part.

  Opening and reading raise Damaged.
  """

  def __init__(self, path: str | os.PathLike):
    store = {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    # By default TensorStore reads an absent chunk as zeros; here it is damage.
    spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
    self._path = path
    with reading(path, _ADVICE):
      self._store = tensorstore.open(spec, read=True).result()
    self.shape = tuple(self._store.shape)
    self.dtype = self._store.dtype.numpy_dtype
    self.size = math.prod(self.shape)

  def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
    with reading(self._path, _ADVICE):
      return self._store[index].read().result()

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # every read makes a new array
    with reading(self._path, _ADVICE):
      return self._store.read().result().astype(dtype or self.dtype, copy=False)


def open_tree(directory: str | os.PathLike) -> PyTree:
  """Returns the tree of Stored arrays. Raises Damaged."""

  def open_leaf(path: tuple, _: jax.ShapeDtypeStruct) -> Stored:
    # Orbax names the directory of a leaf by its path joined with dots.
    return Stored(os.path.join(directory, jax.tree_util.keystr(path, simple=True, separator=".")))

  return jax.tree_util.tree_map_with_path(open_leaf, shapes(directory))
