"""ComfyUI's files: a whole pipeline in one, and a tokenizer among a text encoder's tensors."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from hiar_jax.errors import UserError
from tests.conversion.test_layouts import PARTS, assert_holds, run
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
