"""Reader of PyTorch's .pt and .pth files that needs no PyTorch and runs no code from them.

Such a file is a ZIP archive of a pickle and of one member per storage, uncompressed. A pickle is a
program: here it may build plain containers and name slices of storages; a file that asks for
anything else is refused, and the error names it. Tensors are views of the memory-mapped file.
"""

from collections import OrderedDict
import math
import os
import pathlib
import pickle
import struct
from typing import IO, Any, NamedTuple
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
# Exceptions that changed bytes can cause in zipfile, pickle and numpy.
_DAMAGED = (
  zipfile.BadZipFile,
  pickle.UnpicklingError,
  EOFError,
  ArithmeticError,
  AttributeError,
  ImportError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
  struct.error,
)


def read_torch(path: str | os.PathLike) -> Any:
  """Returns the saved object, with read-only numpy views of the file in place of tensors.

  bfloat16 is ml_dtypes' dtype. Raises Damaged, and UserError for a file that was saved by PyTorch
  before 1.6, or that holds anything but tensors, numbers, strings and plain containers.
  """
  path = pathlib.Path(path)
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
    byteorder = pickles[0].removesuffix("data.pkl") + "byteorder"
    if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
      raise UserError(
        f"{path} was saved on a big-endian machine; save it again on a little-endian one"
      )
    with archive.open(pickles[0]) as file:
      unpickler = _Unpickler(file, path, archive)
      return unpickler.resolve(unpickler.load())


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
  return _Tensor(storage[0], _DTYPES[dtype], offset, shape, strides)


def _parameter(tensor, *_) -> _Tensor:
  return tensor


def _device(*name) -> str:
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

  file: the archive's pickle.
  """

  def __init__(self, file: IO[bytes], path: pathlib.Path, archive: zipfile.ZipFile):
    super().__init__(file, encoding="utf-8")
    self.path = path
    self.archive = archive
    self.root = file.name.removesuffix("data.pkl")
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
      raise pickle.UnpicklingError(f"unknown reference {pid!r}")
    return key, dtype

  def resolve(self, value: Any) -> Any:
    """Replaces the tensors in nested containers by arrays."""
    if isinstance(value, _Tensor):
      return self._array(value)
    if isinstance(value, dict):
      return {key: self.resolve(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return type(value)(self.resolve(item) for item in value)
    return value

  def _array(self, tensor: _Tensor) -> np.ndarray:
    """Returns the view of the file that a tensor describes. Raises ValueError."""
    # Every field is checked, since as_strided below would read any address.
    if tensor.dtype not in _DTYPES:
      raise ValueError(f"a tensor of dtype {tensor.dtype!r}")
    dtype, shape, strides = np.dtype(tensor.dtype), tuple(tensor.shape), tuple(tensor.strides)
    numbers = (tensor.offset, *shape, *strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(shape) != len(strides):
      raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {tensor.offset}")
    info = self.archive.getinfo(f"{self.root}data/{tensor.key}")
    if info.compress_type == zipfile.ZIP_STORED:
      # The directory's copy of the header may have an extra field of another length: PyTorch pads
      # the local one to align the numbers.
      header = self.bytes[info.header_offset : info.header_offset + _LOCAL_HEADER.size].tobytes()
      start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
      storage = self.bytes[start : start + info.file_size]
    else:
      storage = np.frombuffer(self.archive.read(info), np.uint8)
    # Whole elements alone: a view needs a multiple of the item size.
    storage = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
    if not math.prod(shape):
      return np.empty(shape, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(storage):
      raise ValueError(f"storage {tensor.key} ends before the tensor that lies in it")
    steps = [step * dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], shape, steps)


assert ml_dtypes.bfloat16  # imported for its effect: numpy knows these dtypes by name
