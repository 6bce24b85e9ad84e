"""The recorded Wan VAE: latents and reconstruction, in one pass, in pieces, and under a scan."""

import functools
import json
import os

import jax
import numpy as np
import pytest

from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.models import vae
from tests.helpers.golden_cases import assert_close, folders
from tests.helpers.published_params import from_published, to_published

FILES = {"config.json", "vae.npz", "vae_weights.npz"}
ARRAYS = {"video", "latents", "reconstruction", "latents_mean", "latents_std"}
CASES = folders("vae.npz")
PASSES = pytest.mark.parametrize("chunk", [None, 1], ids=["one_pass", "scan"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)


def test_a_case_is_found():
  assert CASES or "HIAR_GOLDEN_DIR" in os.environ


def _last(array: np.ndarray) -> np.ndarray:
  """[b c f h w] -> [b f h w c]."""
  return np.moveaxis(array, 1, -1)


@functools.cache
def _load(case):
  sizes = json.loads((case / "config.json").read_text())
  arrays = dict(np.load(case / "vae.npz"))
  config = vae.VAEConfig(
    **{key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()},
    latents_mean=tuple(arrays["latents_mean"].tolist()),
    latents_std=tuple(arrays["latents_std"].tolist()),
  )
  weights = dict(np.load(case / "vae_weights.npz"))
  return config, arrays, weights, from_published(weights, vae_key_map(config), "VAE")


@each_case
def test_nothing_is_unknown(case):
  assert {path.name for path in case.iterdir()} == FILES
  assert set(_load(case)[1]) == ARRAYS


@each_case
def test_published_normalisation_is_the_default(case):
  config = _load(case)[0]
  np.testing.assert_allclose(config.latents_mean, vae.LATENTS_MEAN, rtol=1e-6)
  np.testing.assert_allclose(config.latents_std, vae.LATENTS_STD, rtol=1e-6)


@each_case
@PASSES
def test_latents(case, chunk):
  config, arrays, _, params = _load(case)
  encode = jax.jit(lambda params, video: vae.encode(params, video, config, chunk))
  assert_close(encode(params, _last(arrays["video"])), _last(arrays["latents"]), "latents")


@each_case
@PASSES
def test_reconstruction(case, chunk):
  config, arrays, _, params = _load(case)
  decode = jax.jit(lambda params, latents: vae.decode(params, latents, config, chunk))
  assert_close(
    decode(params, _last(arrays["latents"])), _last(arrays["reconstruction"]), "reconstruction"
  )


@each_case
def test_weights_go_there_and_back_bit_for_bit(case):
  config, _, weights, params = _load(case)
  back = to_published(params, vae_key_map(config), "VAE")
  assert set(back) == set(weights)
  for name, array in weights.items():
    assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name
