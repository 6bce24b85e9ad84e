"""Decoding piece by piece: the same frames as at once, compiled once, for both autoencoders and in
tiles.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from hiar_jax.components import chunked_decoder
from hiar_jax.components.wan_autoencoder import WanCodecConfig
from hiar_jax.errors import UserError
from hiar_jax.models import taehv, vae
from hiar_jax.video.frames import to_uint8
from tests.helpers.slow_cases import slow

VAE = vae.VAEConfig(dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)
TINY = taehv.TinyVAEConfig(
  z_dim=16,
  encoder_width=4,
  decoder_widths=(8, 4),
  blocks=1,
  temporal_downsample=(True,),
  temporal_upsample=(True,),
)
LATENTS = np.random.default_rng(0).normal(size=(1, 7, 6, 8, 16)).astype(np.float32)


def stream(kind, chunk):
  if kind == "tiny":
    made = WanCodecConfig(tiny=True).decoder(TINY, random_params(taehv, TINY))
  else:
    codec = WanCodecConfig(tile=4 if kind == "tiled" else 0)
    made = codec.decoder(VAE, random_params(vae, VAE))
  return dataclasses.replace(made, chunk=chunk)


def whole(kind, decoder):
  if kind == "tiny":
    return jax.jit(lambda params: taehv.decode(params, LATENTS, TINY, chunk=None))(decoder.params)
  if kind == "tiled":
    return None
  return jax.jit(lambda params: vae.decode(params, LATENTS, VAE, chunk=None))(decoder.params)


@functools.cache
def random_params(model, config):
  return jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize("kind", ["vae", "tiny", *slow("tiled")])
def test_pieces_are_the_whole(kind):
  decoder = stream(kind, 1)
  pieces = list(decoder(LATENTS))
  assert [piece.shape[1] for piece in pieces] == [1, 2, 2, 2, 2, 2, 2] and pieces[
    0
  ].dtype == np.uint8
  larger = list(stream(kind, 4)(LATENTS))
  assert [piece.shape[1] for piece in larger] == [1, 8, 4]
  joined = np.concatenate(pieces, axis=1).astype(int)
  assert np.abs(joined - np.concatenate(larger, axis=1)).max() <= 1
  at_once = whole(kind, decoder)
  if at_once is not None:
    assert np.abs(joined - to_uint8(at_once)).max() <= 1
  assert joined.std() > 5


@pytest.mark.parametrize("kind", ["vae", "tiny"])
def test_a_frame_is_spread_over_devices(kind):
  """Its width, over as many of four as divide it; the pictures are those of one device, and each
  holds its share of the cache.
  """
  latents, calls, alone = LATENTS[:, :3], [], stream(kind, 1)
  spread = dataclasses.replace(alone, devices=tuple(jax.devices()[:4]))
  assert [len(spread.place(width).device_set) for width in (8, 6, 7, 104)] == [
    4,
    3,
    1,
    4,
  ] and alone.place(8) is None
  step = spread.step
  object.__setattr__(spread, "step", lambda *args: calls.append(args) or step(*args))
  pieces = np.concatenate(list(spread(latents)), axis=1)
  expected = np.concatenate(list(alone(latents)), axis=1)
  assert np.abs(pieces.astype(int) - expected).max() <= 1 and pieces.std() > 5
  _, piece, cache = calls[2]  # the first cache is half zeros, which are everywhere
  for leaf in [piece, *jax.tree.leaves(cache)]:
    assert leaf.sharding.shard_shape(leaf.shape)[3] * 4 == leaf.shape[3]


def test_compiled_twice_whatever_the_length():
  """Once for the first frame, once for all others: a second video compiles nothing."""
  decoder = stream("vae", 1)
  for frames in (3, 7):
    for piece in decoder(LATENTS[:, :frames]):
      del piece
  assert decoder.step._cache_size() == 2


def test_a_piece_is_decoded_when_it_is_asked_for():
  calls = []

  def decode(params, latents, cache):
    jax.debug.callback(lambda: calls.append(1), ordered=True)
    return latents[..., :3], latents

  pieces = chunked_decoder.ChunkedDecoder(decode, {})(LATENTS)
  assert len(list(itertools.islice(pieces, 2))) == 2
  jax.effects_barrier()
  assert len(calls) == 2


def test_bad_chunk():
  with pytest.raises(UserError, match="chunk = 0: expected at least 1"):
    stream("tiny", 0)


def test_small_tiles_are_said_and_smaller_ones_refused(capsys):
  WanCodecConfig(tile=16).open("")
  assert capsys.readouterr().err == ""
  WanCodecConfig(tile=4).open("")
  assert "note: tiles of 4 latents a side (32 pixels) may show seams" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"codec.tile = 3: expected at least 4"):
    WanCodecConfig(tile=3)
