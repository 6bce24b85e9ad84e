"""ComfyUI's files: a whole pipeline in one, and a tokenizer among a text encoder's tensors."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiar_jax.errors import UserError
from tests.conversion.test_layouts import PARTS, assert_holds, run
from tests.helpers import torch_archive
from tests.helpers.published_files import params, tensors

# how names begin in ComfyUI's file of a whole pipeline
PIPELINE = {
  "dit": "model.diffusion_model.",
  "vae": "first_stage_model.",
  "umt5": "text_encoders.umt5xxl.transformer.",
}


def pipeline_file(path):
  layouts = {"dit": "original", "vae": "original", "umt5": "diffusers"}
  named = {
    PIPELINE[kind] + name: array
    for kind, layout in layouts.items()
    for name, array in tensors(kind, layout).items()
  }
  named[PIPELINE["umt5"] + "spiece_model"] = np.arange(9, dtype=np.uint8)
  save_file(named, path)
  return path


def test_a_whole_pipeline_in_one_file(tmp_path):
  source = pipeline_file(tmp_path / "pipeline.safetensors")
  lines = run(source, tmp_path / "out")
  for kind in PARTS:
    assert_holds(tmp_path / "out", kind, params(kind))
  assert "spiece_model, a tokenizer's file among the tensors, is left out" in "".join(lines)
  assert len(run(source, tmp_path / "alone", kind="vae")) == 1
  assert [path.name for path in (tmp_path / "alone").iterdir()] == ["vae"]
  with pytest.raises(UserError, match="--kind=tiny_vae: .*holds nothing of that kind"):
    run(source, tmp_path / "other", kind="tiny_vae")


def test_a_text_encoder_with_its_tokenizer_among_the_tensors(tmp_path):
  named = tensors("umt5", "diffusers") | {"spiece_model": np.arange(9, dtype=np.uint8)}
  save_file(named, tmp_path / "umt5.safetensors")
  lines = run(tmp_path / "umt5.safetensors", tmp_path / "out")
  assert_holds(tmp_path / "out", "umt5", params("umt5"))
  assert "spiece_model, a tokenizer's file among the tensors, is left out" in lines[0]


@pytest.mark.parametrize("kind", ["vae", "umt5"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_one_part_alone_under_its_prefix(tmp_path, kind, suffix):
  named = tensors(kind, {"vae": "original", "umt5": "diffusers"}[kind])
  named = {PIPELINE[kind] + name: array for name, array in named.items()}
  path = tmp_path / f"part.{suffix}"
  (save_file if suffix == "safetensors" else torch_archive.save)(named, path)
  (line,) = run(path, tmp_path / "out")
  assert_holds(tmp_path / "out", kind, params(kind))
  assert f"out/{kind}: " in line


def test_parts_of_no_model_here_are_said_once(tmp_path):
  path = pipeline_file(tmp_path / "pipeline.safetensors")
  named = load_file(path) | {f"cond_stage_model.{i}": np.zeros(2, np.float32) for i in "ba"}
  save_file(named, path)
  lines = run(path, tmp_path / "out")
  said = "pipeline.safetensors: 2 tensors of no model known here (cond_stage_model.a, ...) are left"
  assert [line for line in lines if "no model known" in line] == [f"{said} out"]
  for kind in PARTS:
    assert_holds(tmp_path / "out", kind, params(kind))


@pytest.mark.parametrize("name", ["scaled_fp8", "blocks.0.ffn.0.scale_weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_weights_are_named_as_such(tmp_path, name, prefix):
  named = tensors("dit") | {name: np.zeros(1, np.float32)}
  save_file({prefix + key: array for key, array in named.items()}, tmp_path / "a.safetensors")
  said = rf"fp8-scaled weights \(1 tensors of scales, as {name}\), which are not read; give"
  with pytest.raises(UserError, match=said):
    run(tmp_path / "a.safetensors", tmp_path / "out")


def test_no_advice_where_no_config_helps(tmp_path):
  save_file(tensors("dit") | {"blocks.0.lora": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
  said = "not those of a model that is known here: 1 left over .blocks.0.lora.. Give the complete"
  with pytest.raises(UserError, match=said):
    run(tmp_path / "a.safetensors", tmp_path / "out")
