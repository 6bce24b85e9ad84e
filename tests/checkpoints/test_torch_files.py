"""Reading .pt and .pth files: every form of tensor that they hold, and nothing that they ask to
run.
"""

from collections import OrderedDict
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from hiar_jax.checkpoints import torch_files
from hiar_jax.checkpoints.torch_files import read_torch
from hiar_jax.errors import UserError
from tests.helpers import tiny
from tests.helpers.torch_archive import Call, Parameter, Slice, save


def test_nested_values_come_back(tmp_path):
  weight = tiny.random(0, 3, 4)
  state = OrderedDict(
    weight=weight,
    half=weight.astype(ml_dtypes.bfloat16),
    step=np.asarray(7),
    none=np.zeros((0, 3), np.float32),
  )
  saved = {
    "generator": state,
    "list": [1, (2.5, "three", None, True)],
    "parameter": Parameter(weight[1]),
  }
  found = read_torch(save(saved, tmp_path / "a.pt"))
  assert found["list"] == [1, (2.5, "three", None, True)]
  np.testing.assert_array_equal(found["parameter"], weight[1])
  for name, array in state.items():
    got = found["generator"][name]
    assert (
      got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()
    ), name


def test_views_of_one_storage(tmp_path):
  """Transposes and slices are saved as strides over a shared storage."""
  base = tiny.random(0, 12)
  saved = {
    "transposed": Slice(base, 0, (4, 3), (1, 4)),
    "row": Slice(base, 5, (2,), (3,)),
    "scalar": Slice(base, 11, (), ()),
  }
  found = read_torch(save(saved, tmp_path / "a.pt"))
  np.testing.assert_array_equal(found["transposed"], base.reshape(3, 4).T)
  np.testing.assert_array_equal(found["row"], base[[5, 8]])
  assert found["scalar"] == base[11]


def test_nothing_is_copied(tmp_path):
  array = read_torch(save({"a": tiny.random(0, 100)}, tmp_path / "a.pt"))["a"]
  while isinstance(array.base, np.ndarray):
    array = array.base
  assert not array.flags.owndata and not array.flags.writeable  # the mapped file


def write(path, program, byteorder=b"little", compress=(), storages=()):
  """An archive of parts as they are; compress: the parts that are."""
  parts = {"data.pkl": program, "byteorder": byteorder}
  parts |= {f"data/{key}": content for key, content in enumerate(storages)}
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in parts.items():
      kind = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
      archive.writestr(f"a/{name}", content, kind)
  return path


ONE = (  # a tensor of four numbers in storage 0
  b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n"
  b"I4\ntQI0\n(I4\nt(I1\ntI00\n)tR."
)


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "data/0"])
def test_compressed_members_are_refused(tmp_path, name):
  """A few bytes of them may be gigabytes, once for each tensor that lies in one."""
  assert read_torch(write(tmp_path / "a.pt", ONE, storages=[bytes(16)])).shape == (4,)
  path = write(tmp_path / "a.pt", ONE, storages=[bytes(16)], compress=[name])
  with pytest.raises(UserError, match=f"a/{name} is compressed, which torch.save never does"):
    read_torch(path)


def test_parts_that_are_too_large(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="byteorder has 1,000 bytes, expected at most 16"):
    read_torch(write(tmp_path / "a.pt", ONE, bytes(1000), storages=[bytes(16)]))
  monkeypatch.setattr(torch_files, "_LARGEST_PICKLE", 10)
  with pytest.raises(UserError, match=r"data\.pkl has \d+ bytes, expected at most 10"):
    read_torch(write(tmp_path / "a.pt", ONE, storages=[bytes(16)]))


@pytest.mark.parametrize(
  "program",
  [
    b"\x80\x02]r\xff\xff\xff\xff.",  # place 2**32 - 1 of the memo
    b"\x80\x02]r\x00\x00\x00\x08.",
    b"\x80\x02]p999999999\n.",
    b"\x80\x05\x8e" + struct.pack("<Q", 10**18) + b".",  # bytes
    b"\x80\x05\x96" + struct.pack("<Q", 10**18) + b".",  # a bytearray
    b"\x80\x05\x8d" + struct.pack("<Q", 10**18) + b".",  # a text
  ],
)
def test_a_few_bytes_that_ask_for_gigabytes(tmp_path, program):
  tracemalloc.start()
  with pytest.raises(UserError, match=r"a\.pt is damaged \(ValueError") as error:
    read_torch(write(tmp_path / "a.pt", program))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 10**6 and "\n" not in str(error.value)


def test_lists_that_are_twice_in_the_next(tmp_path):
  nested = []
  for _ in range(60):
    nested = [nested, nested]
  found = read_torch(write(tmp_path / "a.pt", pickle.dumps(nested, 2)))
  assert found[0] is found[1] and len(found[0]) == 2


def test_lists_without_an_end(tmp_path):
  endless = []
  endless.append(endless)
  with pytest.raises(UserError, match="damaged.*RecursionError"):
    read_torch(write(tmp_path / "a.pt", pickle.dumps(endless, 2)))


def test_one_number_as_many(tmp_path):
  path = save({"a": Slice(tiny.random(0, 4), 0, (2**40,), (0,))}, tmp_path / "a.pt")
  with pytest.raises(UserError, match=r"of shape \(1099511627776,\) in a storage of 4 numbers"):
    read_torch(path)


def test_lack_of_memory_is_one_line(tmp_path, monkeypatch):
  def none_left(program):
    raise MemoryError

  monkeypatch.setattr(torch_files, "_check_numbers", none_left)
  with pytest.raises(UserError, match=r"a\.pt asks for more memory than there is"):
    read_torch(write(tmp_path / "a.pt", ONE, storages=[bytes(16)]))


class Touch:
  """Leaves a trace if it is ever unpickled by calling what it names."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_something_is_refused_by_its_name(tmp_path, protocol):
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("a/data.pkl", pickle.dumps({"a": Touch(tmp_path / "trace")}, protocol))
  with pytest.raises(
    UserError, match=r"asks to run (posix|nt)\.mkdir.*nothing of it was run"
  ) as error:
    read_torch(tmp_path / "a.pt")
  assert "\n" not in str(error.value) and not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
  "name",
  ["builtins.eval", "builtins.getattr", "importlib.import_module", "torch.load", "numpy.ndarray"],
)
def test_what_else_is_refused(tmp_path, name):
  """Also the tools with which harmless names are turned into others.

  The names stand in the pickle as they are: protocol 0.
  """
  module, function = name.rsplit(".", 1)
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("a/data.pkl", f"c{module}\n{function}\n(S'1'\ntR.")
  with pytest.raises(UserError, match=f"asks to run {name}"):
    read_torch(tmp_path / "a.pt")


def test_names_with_dots_lead_nowhere(tmp_path):
  """Protocol 4 lets a name walk along attributes: from an allowed one to its globals, say."""
  dotted = b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93."
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("a/data.pkl", dotted)
  with pytest.raises(UserError, match="__globals__"):
    read_torch(tmp_path / "a.pt")


FORGED = {
  # (key, dtype) without a storage behind it
  "object": b"(S'0'\nS'O'\nt",
  "unhashable": b"(S'0'\n(lt",
  # attributes written into an allowed object
  "not enough values": b"ccollections\nOrderedDict\n)R(dS'key'\nS'0'\nsS'dtype'\nS'O'\nsb",
  "string": b"(S'storage'\nS'S4'\nS'0'\nS'cpu'\nI4\ntQ",
  "unknown reference": b"(S'module'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ",
}


@pytest.mark.parametrize("name", FORGED)
def test_storages_that_are_none(tmp_path, name):
  """Bytes of a file must never become references to objects."""
  program = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + FORGED[name] + b"I0\n(I1\nt(I1\ntI00\n)tR."
  )
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("a/data.pkl", program)
    archive.writestr("a/data/0", bytes(16))
  said = {
    "object": "a tensor of dtype 'O'",
    "string": "a tensor of dtype 'S4'",
    "unhashable": r"a tensor of dtype \[\]",
  }.get(name, name)
  with pytest.raises(UserError, match=f"is damaged .*{said}"):
    read_torch(tmp_path / "a.pt")


def test_a_call_of_an_allowed_name_with_nonsense_is_damage(tmp_path):
  with pytest.raises(UserError, match="damaged"):
    read_torch(save({"a": Call(OrderedDict, 3)}, tmp_path / "a.pt"))


@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [
    (0, (13,), (1,)),
    (9, (2, 2), (3, 1)),
    (12, (1,), (1,)),
    (-1, (2,), (1,)),
    (4, (4,), (-1,)),
    (0, (2, 2), (1,)),
    (0, ("2",), (1,)),
  ],
)
def test_tensors_outside_their_storage(tmp_path, offset, shape, strides):
  path = save({"a": Slice(tiny.random(0, 12), offset, shape, strides)}, tmp_path / "a.pt")
  with pytest.raises(UserError, match="damaged"):
    read_torch(path)


def test_the_old_format_says_how_to_save_again(tmp_path):
  (tmp_path / "a.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
  with pytest.raises(UserError, match=r"before 1\.6.*torch\.save\(torch\.load"):
    read_torch(tmp_path / "a.pt")


def test_files_cut_off_at_any_length(tmp_path):
  whole = save({"a": tiny.random(0, 100), "b": tiny.random(1, 5)}, tmp_path / "a.pt").read_bytes()
  for length in [*range(0, len(whole), 97), len(whole) - 1]:
    (tmp_path / "a.pt").write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"cut off|no file of torch\.save|damaged"):
      read_torch(tmp_path / "a.pt")


@pytest.mark.parametrize(
  ("record", "at", "value", "said"),
  [
    (b"PK\x01\x02", 6, b"\x63", "zip file version 9.9"),
    (b"PK\x01\x02", 8, b"\x01", "is encrypted"),
    (b"PK\x01\x02", 8, b"\x20", "compressed patched data"),
    (b"PK\x05\x06", 16, struct.pack("<I", 2**31), "Invalid argument"),
  ],
)
def test_a_directory_that_is_none_of_torch_save(tmp_path, record, at, value, said):
  """The version, the flags, and where the directory begins."""
  content = bytearray(save({"a": tiny.random(0, 8)}, tmp_path / "a.pt").read_bytes())
  place = content.index(record) + at
  content[place : place + len(value)] = value
  (tmp_path / "a.pt").write_bytes(content)
  with pytest.raises(UserError, match=f"a.pt is damaged .*{said}"):
    read_torch(tmp_path / "a.pt")


def test_a_storage_that_is_shorter_than_its_tensor(tmp_path):
  path = save({"a": tiny.random(0, 8)}, tmp_path / "a.pt")
  short = io.BytesIO()
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(short, "w") as new:
    for name in old.namelist():
      new.writestr(name, old.read(name)[: 16 if "/data/" in name else None])
  path.write_bytes(short.getvalue())
  with pytest.raises(UserError, match="damaged.*storage 0 ends before"):
    read_torch(path)


def test_other_files(tmp_path):
  with pytest.raises(UserError, match=r"no file .*a\.pt"):
    read_torch(tmp_path / "a.pt")
  (tmp_path / "a.pt").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
  with pytest.raises(UserError, match=r"no file of torch\.save"):
    read_torch(tmp_path / "a.pt")
  with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
    archive.writestr("readme.txt", "hello")
  with pytest.raises(UserError, match=r"not one of torch\.save"):
    read_torch(tmp_path / "a.pt")


def test_big_endian_is_refused(tmp_path):
  with pytest.raises(UserError, match="big-endian"):
    read_torch(save({"a": tiny.random(0, 2)}, tmp_path / "a.pt", byteorder="big"))
