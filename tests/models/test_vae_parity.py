"""diffusers' AutoencoderKLWan with small random weights: the same numbers, and weights that go
there and back.

Needs the extra `[parity]` (torch, diffusers).
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.models import vae
from tests.helpers.published_params import from_published, to_published

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

CONFIG = vae.VAEConfig(dim=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def peer():
  import diffusers
  import torch

  torch.manual_seed(0)
  model = diffusers.AutoencoderKLWan(
    base_dim=CONFIG.dim,
    z_dim=CONFIG.z_dim,
    dim_mult=list(CONFIG.dim_mult),
    num_res_blocks=CONFIG.num_res_blocks,
    temperal_downsample=list(CONFIG.temporal_downsample),
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # gains of one and biases of zero would hide mistakes
      parameter += 0.1 * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
  path = tmp_path_factory.mktemp("vae")
  peer.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def params(folder):
  return from_published(load_file(folder / WEIGHTS), vae_key_map(CONFIG, "diffusers"), "VAE")


def _assert_close(actual, expected):
  actual, expected = np.asarray(actual), np.moveaxis(expected, 1, -1)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 24), (9, 24, 16)])
def test_encode_and_decode(peer, params, frames, height, width):
  import torch

  video = (
    np.random.default_rng(0).uniform(-1, 1, size=(2, 3, frames, height, width)).astype(np.float32)
  )
  with torch.no_grad():
    latents = peer.encode(torch.from_numpy(video)).latent_dist.mode()
    frames_back = peer.decode(latents).sample.numpy()
  latents = latents.numpy()
  # The peer leaves normalisation to its pipeline and clips what it decodes.
  encode = jax.jit(lambda params, x: vae.denormalise(vae.encode(params, x, CONFIG), CONFIG))
  decode = jax.jit(
    lambda params, z: vae.decode(params, vae.normalise(z, CONFIG), CONFIG).clip(-1, 1)
  )
  _assert_close(encode(params, np.moveaxis(video, 1, -1)), latents)
  _assert_close(decode(params, np.moveaxis(latents, 1, -1)), frames_back)


def test_normalisation_is_the_peers(peer):
  assert (
    tuple(peer.config.latents_mean) == vae.LATENTS_MEAN
    and tuple(peer.config.latents_std) == vae.LATENTS_STD
  )


def test_weights_go_back_and_load(peer, folder, params, tmp_path):
  import diffusers

  back, original = (
    to_published(params, vae_key_map(CONFIG, "diffusers"), "VAE"),
    load_file(folder / WEIGHTS),
  )
  assert set(back) == set(original)
  assert all(back[name].tobytes() == array.tobytes() for name, array in original.items())
  save_file(back, tmp_path / WEIGHTS, metadata={"format": "pt"})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  loaded = diffusers.AutoencoderKLWan.from_pretrained(tmp_path).state_dict()
  assert all((loaded[name] == tensor).all() for name, tensor in peer.state_dict().items())
