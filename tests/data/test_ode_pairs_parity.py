"""Trajectories as torch.save writes them: the numbers that torch.load gives.

Needs the extra `[parity]` (torch).
"""

import numpy as np
import pytest

from hiar_jax.data import ode_pairs, tfds_builder

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_torch_saved(dtype, tmp_path):
  import torch

  walk = torch.randn(1, 49, 3, 16, 4, 6, generator=torch.manual_seed(0)).to(getattr(torch, dtype))
  for i, prompt in enumerate(["A cat walks", "一只猫 🐈"]):
    kept = (walk + i)[:, [0, 12, 24, 36, -1]]
    torch.save({prompt: kept.cpu().detach()}, tmp_path / f"{i:05d}.pt")
  ode_pairs.prepare(tmp_path / "out", tmp_path, dtype="float32")
  for i, record in enumerate(tfds_builder.open_source(tmp_path / "out")):
    ((prompt, expected),) = torch.load(tmp_path / f"{i:05d}.pt").items()
    assert record["caption"].decode() == prompt
    np.testing.assert_array_equal(
      record["trajectory"], expected[0].float().permute(0, 1, 3, 4, 2).numpy()
    )
