"""Reader of PyTorch's .pt and .pth files that needs no PyTorch and runs no code from them.

Such a file is a ZIP archive of a pickle and of one member per storage, uncompressed. A pickle is a
program: here it may build plain containers and name slices of storages; a file that asks for
anything else is refused, and the error names it. Tensors are views of the memory-mapped file.
"""

from collections import OrderedDict
import io
import math
import os
import pathlib
import pickle
import pickletools
import reprlib
import struct
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.files import reading

# PyTorch's storage classes, as pickles name them, and the dtypes of their elements.
_STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
  "UntypedStorage": "uint8",
}
_DTYPES = {
  **{name: name for name in _STORAGES.values()},
  "float8_e4m3fn": "float8_e4m3fn",
  "float8_e5m2": "float8_e5m2",
}
# Local header of a ZIP member, 30 bytes; the last two fields are the lengths of its name and of its
# extra field, which follow (APPNOTE.TXT, section 4.3.7).
_LOCAL_HEADER = struct.Struct("<26xHH")
# Bytes of the largest pickle that is read; that of a DiT with its optimizer has less than 1 MB.
_LARGEST_PICKLE = 64 * 10**6
# Exceptions that changed bytes can cause in zipfile, pickle and numpy.
_DAMAGED = (
  zipfile.BadZipFile,
  pickle.UnpicklingError,
  EOFError,
  ArithmeticError,
  AttributeError,
  ImportError,
  LookupError,
  OSError,  # of a place before the file's first byte
  RuntimeError,  # of an encrypted member, of another ZIP, of containers that are too deep
  TypeError,
  ValueError,
  struct.error,
)


def read_torch(path: str | os.PathLike) -> Any:
  """Returns the saved object, with read-only numpy views of the file in place of tensors.

  bfloat16 is ml_dtypes' dtype. Raises Damaged, and UserError for a file that was saved by PyTorch
  before 1.6, that holds anything but tensors, numbers, strings and plain containers, or that asks
  for more memory than there is.
  """
  try:
    return _read(pathlib.Path(path))
  except MemoryError as error:
    raise UserError(
      f"{path} asks for more memory than there is; download it again, or free some memory"
    ) from error


def _read(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise UserError(f"there is no file {path}; check the path")
  if not zipfile.is_zipfile(path):
    raise UserError(_not_an_archive(path))
  with reading(path, "download or copy it again", _DAMAGED), zipfile.ZipFile(path) as archive:
    pickles = [
      name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
      raise UserError(
        f"{path} is a ZIP archive, but not one of torch.save (it has {len(pickles)} members "
        "data.pkl, not one)"
      )
    root = pickles[0].removesuffix("data.pkl")
    byteorder = f"{root}byteorder"
    if byteorder in archive.namelist() and _content(archive, byteorder, 16) != b"little":
      raise UserError(
        f"{path} was saved on a big-endian machine; save it again on a little-endian one"
      )
    program = _content(archive, pickles[0], _LARGEST_PICKLE)
    _check_numbers(program)
    unpickler = _Unpickler(program, path, archive, root)
    return unpickler.resolve(unpickler.load())


def _uncompressed(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
  """Returns a member's entry. Raises ValueError for a compressed one, KeyError for none."""
  info = archive.getinfo(name)
  # torch.save compresses nothing, and a few bytes of a compressed member may be gigabytes
  if info.compress_type != zipfile.ZIP_STORED:
    raise ValueError(f"{name} is compressed, which torch.save never does")
  return info


def _content(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
  """Returns a member of at most `most` bytes. Raises ValueError for a larger one."""
  info = _uncompressed(archive, name)
  if info.file_size > most:
    raise ValueError(f"{name} has {info.file_size:,} bytes, expected at most {most:,}")
  return archive.read(info)


def _check_numbers(program: bytes) -> None:
  """Raises ValueError where a pickle would have the unpickler reserve more than the pickle's size.

  That is a text longer than what follows, or a place in the memo far beyond those in use.
  """
  # genops itself refuses texts that are longer than what follows
  for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
    if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
      raise ValueError(f"its pickle numbers an object {argument}, of {count} before it")


def _not_an_archive(path: pathlib.Path) -> str:
  """Returns the error message for a file that is no ZIP archive, from its first bytes."""
  with open(path, "rb") as file:
    start = file.read(4)
  if start[:1] == b"\x80":  # opcode PROTO, with which a pickle starts
    return (
      f"{path} was saved in the format of PyTorch before 1.6, which cannot be read safely; save "
      "it again with a newer one: torch.save(torch.load(old, weights_only=True), new)"
    )
  if start == b"PK\x03\x04":  # a ZIP archive starts so, but its directory is at the end
    return (
      f"{path} is cut off ({path.stat().st_size:,} bytes, without the archive's directory at "
      "the end); download or copy it again"
    )
  return (
    f"{path} is no file of torch.save (it is neither a ZIP archive nor a pickle); give a "
    ".pt, .pth or .safetensors file"
  )


class _Tensor(NamedTuple):
  """A slice of a storage, as a pickle describes it; offset and strides count elements.

  Nothing is to be believed: a pickle may call the stand-ins below with anything.
  """

  key: Any
  dtype: Any
  offset: Any
  shape: Any
  strides: Any


# Stand-ins for the functions that PyTorch's pickles call. They make descriptions only; the file is
# read when the pickle has ended.


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
  key, dtype = storage
  return _Tensor(key, dtype, offset, shape, strides)


def _tensor_of_dtype(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> _Tensor:
  del requires_grad, hooks
  return _Tensor(storage[0], dtype, offset, shape, strides)


def _parameter(tensor, *_) -> _Tensor:
  return tensor


def _device(*name) -> str:
  if not all(isinstance(part, str | int) for part in name):
    raise ValueError("a device that is neither a name nor a number")
  return ":".join(map(str, name))


# (module, name) in a pickle -> stand-in. Anything else is refused.
_ALLOWED = {
  ("collections", "OrderedDict"): OrderedDict,
  ("torch._utils", "_rebuild_tensor"): _tensor,
  ("torch._utils", "_rebuild_tensor_v2"): _tensor,
  ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
  ("torch._utils", "_rebuild_parameter"): _parameter,
  ("torch", "Size"): tuple,
  ("torch", "device"): _device,
  ("builtins", "set"): set,
  ("__builtin__", "set"): set,
  **{("torch", name): dtype for name, dtype in _STORAGES.items()},
  ("torch.storage", "UntypedStorage"): "uint8",
  **{("torch", name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
  """Unpickler that resolves the names in _ALLOWED and no others; then reads the tensors.

  program: the archive's pickle; root: what the names of its members begin with.
  """

  def __init__(self, program: bytes, path: pathlib.Path, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(program), encoding="utf-8")
    self.path = path
    self.archive = archive
    self.root = root
    # By id. With the value, so that no other object gets its id.
    self.resolved: dict[int, tuple[Any, Any]] = {}
    self.bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))

  def find_class(self, module: str, name: str) -> Any:
    found = _ALLOWED.get((module, name))
    if found is None:
      raise UserError(
        f"{self.path} asks to run {module}.{name}, which weights have no need of; nothing of it "
        "was run. If you trust the file, save its tensors alone: "
        "torch.save(torch.load(file, weights_only=False)['model'], new)"
      )
    return found

  def persistent_load(self, pid: Any) -> tuple[Any, Any]:
    """Returns a storage: (the name of its member, its dtype)."""
    kind, dtype, key, *_ = pid  # further: device and number of elements
    if kind != "storage":
      raise pickle.UnpicklingError(f"unknown reference {reprlib.repr(pid)}")
    return key, dtype

  def resolve(self, value: Any) -> Any:
    """Replaces the tensors in nested containers by arrays; what is shared stays shared."""
    if not isinstance(value, _Tensor | dict | list | tuple):
      return value
    # Once each: lists that are twice in the next one would else be resolved 2**depth times.
    if id(value) not in self.resolved:
      if isinstance(value, _Tensor):
        found = self._array(value)
      elif isinstance(value, dict):
        found = {key: self.resolve(item) for key, item in value.items()}
      else:
        found = type(value)(self.resolve(item) for item in value)
      self.resolved[id(value)] = value, found
    return self.resolved[id(value)][1]

  def _array(self, tensor: _Tensor) -> np.ndarray:
    """Returns the view of the file that a tensor describes. Raises ValueError."""
    # Every field is checked, since as_strided below would read any address.
    if not isinstance(tensor.dtype, str) or tensor.dtype not in _DTYPES:
      raise ValueError(f"a tensor of dtype {reprlib.repr(tensor.dtype)}")
    dtype, shape, strides = np.dtype(tensor.dtype), tuple(tensor.shape), tuple(tensor.strides)
    numbers = (tensor.offset, *shape, *strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(shape) != len(strides):
      found = (shape, strides, tensor.offset)
      raise ValueError(f"a tensor of (shape, strides, offset) {reprlib.repr(found)}")
    if not isinstance(tensor.key, str):
      raise ValueError(f"a storage called {reprlib.repr(tensor.key)}")
    info = _uncompressed(self.archive, f"{self.root}data/{tensor.key}")
    # The directory's copy of the header may have an extra field of another length: PyTorch pads
    # the local one to align the numbers.
    header = self.bytes[info.header_offset : info.header_offset + _LOCAL_HEADER.size].tobytes()
    start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
    storage = self.bytes[start : start + info.file_size]
    # Whole elements alone: a view needs a multiple of the item size.
    storage = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
    if not math.prod(shape):
      return np.empty(shape, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(storage):
      raise ValueError(f"storage {tensor.key} ends before the tensor that lies in it")
    # With a stride of 0 one number may be any number of them, and fill the disk when it is written.
    if math.prod(shape) > len(storage):
      raise ValueError(
        f"a tensor of shape {reprlib.repr(shape)} in a storage of {len(storage):,} numbers; one "
        "that was expanded is to be saved as tensor.contiguous()"
      )
    steps = [step * dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], shape, steps)


assert ml_dtypes.bfloat16  # imported for its effect: numpy knows these dtypes by name
