"""Sources that are not what they seem: other weights than those there, parts that are not
supported, and a config.json that is not to be believed.
"""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from hiar_jax.conversion import layouts
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.errors import UserError
from tests.helpers import tiny_run
from tests.helpers.published_files import CONFIGS, diffusers_folder, original_folder, tensors
from tests.helpers.torch_archive import save


def run(*args, **kwargs) -> list[str]:
  return list(convert(*map(str, args), **kwargs))


def test_other_weights_than_asked_for_are_not_kept(tmp_path):
  """An error names what differs; the weights stay."""
  named, out = tensors("dit"), tmp_path / "out"
  double = {name: 2 * array for name, array in named.items()}
  path = save({"generator_ema": named, "critic": double}, tmp_path / "a.pt")
  run(path, out)
  before = tiny_run.files(out)
  assert "kept" in run(path, out)[-1] and "kept" in run(path, out, dtype="float32")[-1]
  larger = dataclasses.replace(CONFIGS["dit"], num_layers=3)
  save_file(tensors("dit", config=larger), tmp_path / "b.safetensors")
  for source, options, said in (
    (path, {"entry": "critic"}, "entry generator_ema, asked for critic"),
    (path, {"dtype": "bfloat16"}, "dtype float32, asked for bfloat16"),
    (tmp_path / "b.safetensors", {}, "num_layers 2, asked for 3; entry generator_ema, asked for n"),
  ):
    with pytest.raises(UserError, match=f"out/dit is there already, other .*from a.pt: {said}"):
      run(source, out, **options)
  assert tiny_run.files(out) == before


def test_weights_of_before_entries_were_known_are_kept(tmp_path):
  path, out = save({"generator": tensors("dit")}, tmp_path / "a.pt"), tmp_path / "out"
  run(path, out)
  described = json.loads((out / "dit/model.json").read_text())
  assert described.pop("entry") == "generator"
  (out / "dit/model.json").write_text(json.dumps(described))
  assert "kept" in run(path, out)[-1]


@pytest.mark.parametrize(
  ("layout", "both"),
  [
    (diffusers_folder, ("transformer", "transformer_2")),
    (original_folder, ("high_noise_model", "low_noise_model")),
  ],
)
def test_two_experts_are_said(tmp_path, layout, both):
  source = layout(tmp_path / "source")
  for name in both:
    (source / name).mkdir(exist_ok=True)
  with pytest.raises(UserError, match=f"has two DiTs, {both[0]}/ and {both[1]}/ .*give its folder"):
    run(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  run(source, tmp_path / "out", kind="vae")


@pytest.mark.parametrize("layout", [original_folder, diffusers_folder])
def test_the_autoencoder_of_wan_2_2_is_refused_before_anything_is_written(tmp_path, layout):
  source = layout(tmp_path / "source")
  name = ("encoder.conv1", "encoder.conv_in")[layout is diffusers_folder] + ".weight"
  if layout is original_folder:
    (source / "Wan2.1_VAE.pth").unlink()
    save({name: np.zeros((4, 12, 3, 3, 3), np.float32)}, source / "Wan2.2_VAE.pth")
  else:
    named = {name: np.zeros((4, 12, 3, 3, 3), np.float32)}
    save_file(named, source / "vae/diffusion_pytorch_model.safetensors")
  with pytest.raises(UserError, match=r"of 12 channels in, as Wan2\.2's .*not supported"):
    run(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  run(source, tmp_path / "out", kind="dit")


JSON_VALUES = [  # kind, name, wrong values
  ("dit", "num_layers", ["x", [1], 2.5, True, 0, -1]),
  ("dit", "ffn_dim", ["12", {}]),
  ("dit", "freq_dim", ["x"]),
  ("dit", "attention_head_dim", [[1], "128"]),
  ("dit", "patch_size", [2, [1, 2], [1, 2, "2"], []]),
  ("dit", "eps", ["x", -1, float("nan"), float("inf"), [1]]),
  ("dit", "qk_norm", ["rms_norm", False, [1]]),
  ("dit", "cross_attn_norm", [False]),
  ("vae", "dim_mult", [4, [], [1, 0], ["a"]]),
  ("vae", "temperal_downsample", [True, ["x"]]),
  ("vae", "latents_mean", [["a"] * 16, [float("nan")] * 16, 0]),
  ("vae", "latents_std", [[0] * 16, [float("inf")] * 16]),
  ("vae", "is_residual", [True]),
  ("umt5", "d_kv", ["x", 0]),
  ("umt5", "layer_norm_epsilon", [1e-5]),
  ("umt5", "relative_attention_max_distance", [64]),
  ("umt5", "feed_forward_proj", ["relu"]),
]


@pytest.mark.parametrize(("kind", "name", "values"), JSON_VALUES)
def test_a_config_json_is_not_believed(tmp_path, kind, name, values):
  folder = {"dit": "transformer", "vae": "vae", "umt5": "text_encoder"}[kind]
  source = diffusers_folder(tmp_path / "source") / folder
  config = json.loads((source / "config.json").read_text())
  layouts.open_model(source)
  for value in values:
    (source / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=f"its config.json says {name} = .*; expected ") as error:
      layouts.open_model(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["num_layers", "num_res_blocks"])
def test_a_config_json_of_a_billion_layers(tmp_path, name):
  folder = "transformer" if name == "num_layers" else "vae"
  source = diffusers_folder(tmp_path / "source") / folder
  config = json.loads((source / "config.json").read_text())
  (source / "config.json").write_text(json.dumps({**config, name: 10**9}))
  with pytest.raises(UserError, match=rf"says {name} = 1000000000, and there are \d+ tensors"):
    layouts.open_model(source)


def test_a_config_json_that_is_very_deep(tmp_path):
  source = diffusers_folder(tmp_path / "source") / "vae"
  (source / "config.json").write_text("[" * 100_000)
  with pytest.raises(UserError, match=r"config\.json is damaged \(maximum recursion"):
    layouts.open_model(source)


def test_names_that_no_file_has(tmp_path):
  with pytest.raises(UserError, match="there is no such file or folder"):
    run("a" * 999, tmp_path / "out")
  save_file(tensors("vae"), tmp_path / "a.safetensors")
  with pytest.raises(UserError, match="a: cannot be written .File name too long."):
    run(tmp_path / "a.safetensors", tmp_path / ("a" * 999))


def test_an_export_to_where_no_folder_can_be(tmp_path):
  save_file(tensors("vae"), tmp_path / "a.safetensors")
  run(tmp_path / "a.safetensors", tmp_path / "out")
  (tmp_path / "file").write_bytes(b"x")
  with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"):
    list(export(tmp_path / "out", "diffusers", tmp_path / "file"))
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").rename(tmp_path / "folder" / "vae")
  with pytest.raises(UserError, match=r"folder/vae: cannot be written \(Not a directory\)"):
    list(export(tmp_path / "out", "diffusers", tmp_path / "folder"))
