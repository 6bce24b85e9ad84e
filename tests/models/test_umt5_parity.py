"""transformers' UMT5EncoderModel with small random weights: the same numbers, and weights that go
there and back.

Needs the extra `[parity]` (torch, transformers).
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.models import umt5
from tests.helpers.published_params import from_published, to_published

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

CONFIG = umt5.UMT5Config(vocab=60, dim=32, dim_attn=24, dim_ffn=40, num_heads=4, num_layers=2)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def peer():
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.UMT5Config(
    vocab_size=CONFIG.vocab,
    d_model=CONFIG.dim,
    d_kv=CONFIG.dim_attn // CONFIG.num_heads,
    d_ff=CONFIG.dim_ffn,
    num_layers=CONFIG.num_layers,
    num_heads=CONFIG.num_heads,
    feed_forward_proj="gated-gelu",
  )
  model = transformers.UMT5EncoderModel(config).eval()
  with torch.no_grad():
    # gains of one and tiny biases of distance would hide mistakes
    for parameter in model.parameters():
      parameter += 0.2 * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
  path = tmp_path_factory.mktemp("umt5")
  peer.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def params(folder):
  return from_published(load_file(folder / WEIGHTS), umt5_key_map(CONFIG, "diffusers"), "UMT5")


@pytest.mark.parametrize("length", [9, 512])
def test_encode(peer, params, length):
  import torch

  ids = np.random.default_rng(0).integers(0, CONFIG.vocab, size=(2, length))
  mask = (np.arange(length) < np.asarray([[length], [length // 2]])).astype(np.int64)
  with torch.no_grad():
    expected = (
      peer(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
      * mask[..., None]
    )
  encode = jax.jit(lambda params, ids, mask: umt5.encode_text(params, ids, mask, CONFIG))
  text = encode(params, ids.astype(np.int32), mask.astype(np.int32))
  assert np.abs(text - expected).max() <= 1e-4 * np.abs(expected).max()


def test_distance_buckets_are_the_peers(peer):
  import torch

  attention = peer.encoder.block[0].layer[0].SelfAttention
  length = 512  # the published prompt length
  distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
  np.testing.assert_array_equal(
    umt5.relative_buckets(length, CONFIG.num_buckets),
    attention._relative_position_bucket(distance).numpy(),
  )


def test_weights_go_back_and_load(peer, folder, params, tmp_path):
  import transformers

  back, original = (
    to_published(params, umt5_key_map(CONFIG, "diffusers"), "UMT5"),
    load_file(folder / WEIGHTS),
  )
  assert set(back) == set(original)
  assert all(back[name].tobytes() == array.tobytes() for name, array in original.items())
  save_file(back, tmp_path / WEIGHTS, metadata={"format": "pt"})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  loaded = transformers.UMT5EncoderModel.from_pretrained(tmp_path).state_dict()
  assert all((loaded[name] == tensor).all() for name, tensor in peer.state_dict().items())
