"""A model of Wan's layout from a config and weights: it keeps what it is given, encodes and decodes
on its devices, and has an identity.
"""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.checkpoints import weights
from hiar_jax.components.wan_autoencoder import WanAutoencoder
from hiar_jax.errors import UserError
from hiar_jax.generation import clips, video_model
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.generation.prompts_file import Job
from hiar_jax.models import vae, vae_tiling
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers import tiny_wan
from tests.helpers.tiny_wan import VAE, save_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tiny_wan.directory(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(place):
  config = runpy.run_path(str(place / "config.py"))["get_config"]()
  found = video_model.from_config(config, str(place / "weights"), video_model.ModelChanges())
  one = make_mesh(MeshConfig(), jax.devices()[:1])
  return dataclasses.replace(found, run=dataclasses.replace(found.run, mesh=one))


def clip(model, kind, path, given, prompt="A cat"):
  return clips.Clip(Job(prompt, 3), pathlib.Path("x.mp4"), Conditioning(path, kind), given, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, given", [("image", "cat.png", 1), ("video", "before.mp4", 6)])
def test_what_is_given_is_kept_and_shown(model, place, kind, name, given):
  """The first latents of the result are the autoencoder's of the start, to the bit; and what
  follows depends on them.
  """
  start = clip(model, kind, place / name, given)
  pixels, _ = start.start.read(model.experiment)
  assert pixels.shape == (1 + 4 * (given - 1), 16, 32, 3)
  _, params = weights.load(place / "weights", "vae")
  expected = np.asarray(vae.encode(params, jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32), VAE))
  np.testing.assert_allclose(clips.latents_of(model, start.start), expected, atol=1e-4)
  model.prepare_texts(["A cat"])
  made = model.sampler(3)
  args = model.params(), model.run.texts(["A cat"]), np.asarray([3])
  latents = np.asarray(made(*args, expected))
  assert latents.shape == (1, given + 3, 2, 4, 16)
  np.testing.assert_array_equal(latents[:, :given], expected)
  assert np.abs(np.asarray(made(*args, expected + 1))[:, given:] - latents[:, given:]).max() > 1e-3


def test_a_base_model_in_a_students_place_is_said(place, tmp_path, capsys):
  """`--weights=weights/wan_1_3b` for `weights/hiar`; by the numbers, wherever they lie."""
  config = runpy.run_path(str(place / "config.py"))["get_config"]()
  opened = lambda: video_model.from_config(
    config, str(place / "weights"), video_model.ModelChanges()
  )
  for base, said in ((place / "weights", True), (tmp_path / "nowhere", False)):
    config.weights.base = str(base)
    opened()
    assert ("which is bidirectional" in capsys.readouterr().err) == said
  weights.save(tmp_path / "other", "dit", *other_weights(place))
  config.weights.base = str(tmp_path / "other")
  opened()
  assert capsys.readouterr().err == ""


def other_weights(place):
  config, params = weights.load(place / "weights", "dit")
  return config, jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)


def test_a_model_of_another_size_is_refused_before_anything_is_encoded(place):
  config = runpy.run_path(str(place / "config.py"))["get_config"]()
  config.model.num_layers += 1
  with pytest.raises(UserError, match="holds another model than the config describes: num_layers"):
    video_model.from_config(config, str(place / "weights"), video_model.ModelChanges())


@pytest.mark.slow
def test_pictures_of_a_size_are_encoded_by_one_program(model):
  """A file of prompts may hold a hundred of them.

  The mesh that the network runs on is set around it.
  """
  sizes = []
  for value in (0, 255):
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
      latents = model.run.autoencoder.latents(np.full((1, 1, 16, 32, 3), value, np.uint8))
    sizes.append(model.run.autoencoder._encode._cache_size())
  assert latents.shape == (1, 1, 2, 4, 16) and sizes[0] == sizes[1] >= 1


def test_small_memories_encode_in_tiles_too(model, monkeypatch):
  seen = []

  def encode(params, video, config, tiling):
    seen.append((video.shape, config, tiling))
    return jnp.zeros((1, 1, 4, 8, 16))

  monkeypatch.setattr(vae_tiling, "encode", encode)
  e = model.experiment
  tiled = WanAutoencoder(dataclasses.replace(e.codec, tile=4))
  assert tiled.latents(np.zeros((1, 1, 32, 64, 3), np.uint8)).shape == (1, 1, 4, 8, 16)
  assert seen == [((1, 1, 32, 64, 3), VAE, Tiling(4, 1))]


@pytest.mark.slow
def test_a_frame_is_decoded_over_all_devices(model):
  """Inside the mesh that the network runs on, which is another: a width of 4 latents goes to 4 of
  the 8.
  """
  latents = np.random.default_rng(0).normal(size=(1, 1, 2, 4, 16)).astype(np.float32)
  assert len(model.run.autoencoder._wide_stream.place(4).device_set) == 4
  mesh = make_mesh(MeshConfig(data=8))
  with jax.set_mesh(mesh):
    (piece,) = model.run.autoencoder.pieces(
      jax.device_put(latents, jax.NamedSharding(mesh, jax.P()))
    )
  (expected,) = model.run.autoencoder.stream(latents)
  assert np.abs(piece.astype(int) - expected).max() <= 1 and piece.std() > 1


def test_identity_is_of_what_matters(model, place, tmp_path):
  """Another place on the disk is the same model; other weights, another dtype, window or decoder
  are not.
  """
  config = lambda: runpy.run_path(str(place / "config.py"))["get_config"]()
  identity = lambda c, folder, **changes: (
    video_model.from_config(c, str(folder), video_model.ModelChanges(**changes)).identity
  )
  moved, other = save_weights(tmp_path / "moved"), save_weights(tmp_path / "other", seed=5)
  assert identity(config(), moved) == model.identity
  wider = config()
  wider.history.window = 9
  others = [identity(wider, moved), identity(config(), other)]
  others += [
    identity(config(), moved, **change)
    for change in ({"dtype": "bfloat16"}, {"decoder": "tiny_vae"}, {"tile": 4})
  ]
  assert len({model.identity, *others}) == 6
