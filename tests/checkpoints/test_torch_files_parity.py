"""What PyTorch itself saves is read without it, bit for bit. Needs the extra `[parity]` (torch)."""

import ml_dtypes
import numpy as np
import pytest

from hiar_jax.checkpoints.torch_files import read_torch
from hiar_jax.errors import UserError

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn


def _model(torch):
  torch.manual_seed(0)
  return torch.nn.Sequential(
    torch.nn.Linear(5, 4),
    torch.nn.LayerNorm(4).to(torch.bfloat16),
    torch.nn.Conv3d(2, 3, (1, 2, 2)).half(),
  )


def _numpy(torch, tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.detach().numpy()


def test_a_training_checkpoint(tmp_path):
  import torch

  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  state = _model(torch).state_dict()
  odd = {
    "transposed": base.T,
    "slice": base[1:3, ::2],
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
    "bool": torch.tensor([True]),
  }
  other = {
    "step": 7,
    "size": torch.Size([1, 2]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
  }
  torch.save(
    {"generator": state, "odd": odd, "parameter": torch.nn.Parameter(base), **other},
    tmp_path / "a.pt",
  )
  found = read_torch(tmp_path / "a.pt")
  assert found["step"] == 7 and found["size"] == (1, 2) and found["device"] == "cpu"
  np.testing.assert_array_equal(found["parameter"], base.numpy())
  for name, tensor in [*state.items(), *odd.items()]:
    expected, got = _numpy(torch, tensor), {**found["generator"], **found["odd"]}[name]
    assert (
      got.dtype == expected.dtype
      and got.shape == expected.shape
      and got.tobytes() == expected.tobytes()
    ), name


def test_eight_bit_floats(tmp_path):
  import torch

  tensor = torch.linspace(-2, 2, 8).to(torch.float8_e4m3fn)
  torch.save({"a": tensor}, tmp_path / "a.pt")
  found = read_torch(tmp_path / "a.pt")["a"]
  assert found.dtype == ml_dtypes.float8_e4m3fn
  np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


def test_whole_modules_and_the_old_format_are_refused(tmp_path):
  import torch

  torch.save(_model(torch), tmp_path / "module.pt")
  with pytest.raises(UserError, match=r"asks to run torch\.nn\.modules"):
    read_torch(tmp_path / "module.pt")
  torch.save(_model(torch).state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  with pytest.raises(UserError, match=r"before 1\.6"):
    read_torch(tmp_path / "old.pt")
