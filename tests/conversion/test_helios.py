"""Helios's files (packed history on Wan2.1) to weights and back, and what is none of its."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiar_jax.checkpoints import weights
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.errors import UserError
from tests.models.test_dit_packed_golden import helios
from tests.seams import test_packed_history as recorded

FOLDER = recorded.FOLDERS[0]
FILE = "diffusion_pytorch_model.safetensors"


def published(folder, extra=(), **changes) -> dict[str, np.ndarray]:
  """Writes the recorded network as published; returns its tensors."""
  named = recorded.read(FOLDER, "helios_weights.npz") | dict(extra)
  folder.mkdir()
  save_file(named, folder / FILE)
  sizes = json.loads((FOLDER / "framepack.json").read_text())["helios"]
  config = {"_class_name": "HeliosTransformer3DModel", **sizes, **changes}
  (folder / "config.json").write_text(json.dumps(config))
  return named


def test_there_and_back(tmp_path):
  named = published(tmp_path / "source")
  (line,) = convert(str(tmp_path / "source"), str(tmp_path / "weights"))
  assert f"in {len(named)} tensors" in line and "diffusers names" in line
  config, expected = helios(FOLDER)
  found_config, found = weights.load(tmp_path / "weights", "dit")
  assert found_config == config
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  list(export(tmp_path / "weights", "diffusers", tmp_path / "back"))
  back = load_file(tmp_path / "back" / "transformer" / FILE)
  assert back.keys() == named.keys()
  assert all(back[name].tobytes() == array.tobytes() for name, array in named.items())
  written = json.loads((tmp_path / "back" / "transformer" / "config.json").read_text())
  sizes = json.loads((FOLDER / "framepack.json").read_text())["helios"]
  assert sizes.items() <= written.items()
  assert written["_class_name"] == "HeliosTransformer3DModel"
  with pytest.raises(UserError, match="packing by k1, k2, k4 has no published names in the layout"):
    list(export(tmp_path / "weights", "original", tmp_path / "original"))


def test_what_is_not_its_network(tmp_path):
  published(tmp_path / "rope", rope_theta=256.0)
  with pytest.raises(
    UserError, match="rope_dim and rope_theta = .*256.*; expected those of Wan2.1"
  ):
    list(convert(str(tmp_path / "rope"), str(tmp_path / "out")))
  name = "blocks.0.attn1.history_key_scale"
  published(tmp_path / "amplified", {name: np.ones(2, np.float32)})
  with pytest.raises(UserError, match="history_key_scale"):
    list(convert(str(tmp_path / "amplified"), str(tmp_path / "out")))


def test_other_kernels_have_no_published_names():
  config, _ = helios(FOLDER)
  with pytest.raises(UserError, match="packing by k1, k8 has no published names"):
    dit_key_map(dataclasses.replace(config, packing=(1, 8)), "diffusers")
