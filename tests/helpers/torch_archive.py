"""Files as torch.save writes them, made without PyTorch: stand-ins for its modules give the pickle
the names that it uses.
"""

from collections import OrderedDict
import contextlib
import pathlib
import pickle
import sys
import types
from typing import Any
import zipfile

import numpy as np

STORAGES = {
  "float32": "FloatStorage",
  "bfloat16": "BFloat16Storage",
  "float16": "HalfStorage",
  "float64": "DoubleStorage",
  "int64": "LongStorage",
  "uint8": "ByteStorage",
}


class Slice:
  """A tensor that is part of a storage; offset and strides in elements."""

  def __init__(self, storage: np.ndarray, offset: int, shape: tuple, strides: tuple):
    self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class Parameter:
  def __init__(self, data: np.ndarray):
    self.data = data


class Call:
  """What a hostile pickle does: a call of a function, by its name."""

  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


class _Storage:
  def __init__(self, array: np.ndarray):
    self.array = array


def _stand_ins() -> dict[str, types.ModuleType]:
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for name in STORAGES.values():
    setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
  for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
    function = types.FunctionType((lambda: None).__code__, {}, name)
    function.__module__, function.__qualname__ = "torch._utils", name
    setattr(utils, name, function)
  return {"torch": torch, "torch._utils": utils}


@contextlib.contextmanager
def _named_as_torch():
  modules = _stand_ins()
  before = {name: sys.modules.get(name) for name in modules}
  sys.modules.update(modules)
  try:
    yield modules
  finally:
    for name, module in before.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module


class _Pickler(pickle.Pickler):
  def __init__(self, file, modules):
    super().__init__(file, protocol=2)
    self.torch, self.utils, self.storages = modules["torch"], modules["torch._utils"], []

  def persistent_id(self, value):
    if not isinstance(value, _Storage):
      return None
    self.storages.append(value.array)
    kind = getattr(self.torch, STORAGES[value.array.dtype.name])
    return "storage", kind, str(len(self.storages) - 1), "cpu", value.array.size

  def reducer_override(self, value):
    if isinstance(value, np.ndarray):
      flat = np.ascontiguousarray(value)
      steps = tuple(step // flat.itemsize for step in flat.strides) if value.ndim else ()
      value = Slice(flat.reshape(-1), 0, value.shape, steps)
    if isinstance(value, Slice):
      parts = (
        _Storage(value.storage),
        value.offset,
        value.shape,
        value.strides,
        False,
        OrderedDict(),
      )
      return self.utils._rebuild_tensor_v2, parts
    if isinstance(value, Parameter):
      return self.utils._rebuild_parameter, (value.data, True, OrderedDict())
    return NotImplemented


def save(value: Any, path: pathlib.Path, *, byteorder: str = "little") -> pathlib.Path:
  """torch.save(value, path), for arrays, Slices and Parameters in plain containers."""
  with zipfile.ZipFile(path, "w") as archive, _named_as_torch() as modules:
    with archive.open(f"{path.stem}/data.pkl", "w") as file:
      pickler = _Pickler(file, modules)
      pickler.dump(value)
    archive.writestr(f"{path.stem}/byteorder", byteorder)
    for key, storage in enumerate(pickler.storages):
      archive.writestr(f"{path.stem}/data/{key}", storage.tobytes())
    archive.writestr(f"{path.stem}/version", "3\n")
  return path
