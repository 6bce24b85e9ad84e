"""Tiles: equal to the whole where one covers it, close on smooth pictures, no seams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import vae, vae_tiling
from hiar_jax.models.vae_tiling import Tiling
from tests.helpers.slow_cases import slow

CONFIG = vae.VAEConfig(
  dim=4,
  z_dim=3,
  dim_mult=(1, 1),
  num_res_blocks=1,
  temporal_downsample=(True,),
  latents_mean=(0.0,) * 3,
  latents_std=(1.0,) * 3,
)
# compiles twice as fast
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TILING = Tiling(size=24, overlap=8)


@functools.cache
def _params():
  """Random, but calm as a trained network is: pixels listen mostly to themselves, less to
  neighbours and the frame.
  """

  def calm(path, leaf):
    if [key.key for key in path][1:3] == ["mid_attention", "out"]:
      return 0.03 * leaf
    if leaf.ndim < 4:
      return leaf
    neighbours = np.full((*leaf.shape[-4:-2], 1, 1), 0.1, np.float32)
    neighbours[leaf.shape[-4] // 2, leaf.shape[-3] // 2] = 1
    return leaf * neighbours.reshape((1,) * (leaf.ndim - 4) + neighbours.shape)

  params = jax.device_get(jax.jit(lambda: vae.init(CONFIG, jax.random.key(0)))())
  return jax.tree_util.tree_map_with_path(calm, params)


def _without_attention(params):
  """Every pixel sees only its neighbourhood."""

  def cut_off(path, leaf):
    return (
      jnp.zeros_like(leaf) if [key.key for key in path][1:3] == ["mid_attention", "out"] else leaf
    )

  return jax.tree_util.tree_map_with_path(cut_off, params)


def _smooth(frames, height, width):
  """Slow waves around grey, [1 frames height width 3]."""
  t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
  waves = [np.sin(0.2 * t + y * a + x * b) for a, b in ((0.05, 0.02), (0.02, -0.04), (-0.03, 0.03))]
  return (0.6 + 0.2 * np.stack(waves, axis=-1)[None]).astype(np.float32)


@pytest.mark.parametrize("length", [5, 24, 25, 40, 41, 60, 104])
def test_tiles_cover_a_side(length):
  starts = vae_tiling.starts(length, TILING)
  assert starts[0] == 0 and starts[-1] == max(0, length - TILING.size)
  assert all(
    0 < b - a <= TILING.size - TILING.overlap for a, b in zip(starts, starts[1:], strict=False)
  )


@pytest.mark.parametrize("scale", [1, 2])
def test_blending_what_was_cut_gives_it_back(scale):
  picture = (
    np.random.default_rng(0).normal(size=(1, 2, 30 * scale, 50 * scale, 3)).astype(np.float32)
  )
  tiles = vae_tiling.cut(jnp.asarray(picture), TILING, scale)
  assert tiles.shape[0] == 2 * 3
  np.testing.assert_allclose(vae_tiling.blend(tiles, 30, 50, TILING, scale), picture, atol=1e-6)


def test_a_seam_is_a_ramp():
  """One tile black, its neighbour white: the result climbs in even steps, nowhere by more than one
  over the seam.
  """
  tiles = jnp.stack([jnp.zeros((1, 1, 4, 24, 1)), jnp.ones((1, 1, 4, 24, 1))])
  row = np.asarray(vae_tiling.blend(tiles, 4, 40, TILING))[0, 0, 0, :, 0]
  assert (row[:16] == 0).all() and (row[24:] == 1).all()
  np.testing.assert_allclose(np.diff(row[15:25]), [1 / 16, *[1 / 8] * 7, 1 / 16], atol=1e-6)


@pytest.mark.parametrize("way", ["decode", *slow("encode")])
def test_one_tile_is_the_whole_exactly(way):
  x = jnp.asarray(_smooth(3, 24, 32))
  tiled, whole = getattr(vae_tiling, way), getattr(vae, way)
  y = jit(lambda params, x: tiled(params, x, CONFIG, Tiling(32, 8)))(_params(), x)
  np.testing.assert_array_equal(y, jit(lambda params, x: whole(params, x, CONFIG))(_params(), x))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tiles_are_close_on_a_smooth_picture(way):
  """On average within 1 % of the largest value, and much closer than tiles that hardly overlap."""
  scale = CONFIG.spatial_factor if way == "encode" else 1
  x, params = jnp.asarray(_smooth(1, 40 * scale, 56 * scale)), _without_attention(_params())
  whole = getattr(vae, way)(params, x, CONFIG)

  def error(tiling):
    y = getattr(vae_tiling, way)(params, x, CONFIG, tiling)
    assert y.shape == whole.shape
    return np.abs(y - whole).mean() / np.abs(whole).max()

  assert error(TILING) < 0.01
  assert error(TILING) < 0.5 * error(Tiling(TILING.size, 1))


def test_without_attention_pixels_far_from_seams_are_exact():
  x = jnp.asarray(_smooth(1, 4, 40))
  params = _without_attention(_params())
  y = jit(lambda params, x: vae_tiling.decode(params, x, CONFIG, Tiling(30, 20)))(params, x)
  expected = jit(lambda params, x: vae.decode(params, x, CONFIG))(params, x)
  # The first tile alone covers latent columns 0..9; its own end is more than the network's reach
  # away.
  np.testing.assert_allclose(y[:, :, :, :20], expected[:, :, :, :20], atol=1e-5)


@pytest.mark.parametrize("way", ["encode", *slow("decode")])
def test_tiles_can_be_streamed(way):
  x = jnp.asarray(_smooth(3, 16, 24))
  tiling = Tiling(8, 4) if way == "encode" else Tiling(16, 8)
  chunk, whole = getattr(vae_tiling, f"{way}_chunk"), getattr(vae_tiling, way)
  step = jit(lambda params, x, cache: chunk(params, x, cache, CONFIG, tiling))
  first, cache = step(_params(), x[:, :1], None)
  rest, _ = step(_params(), x[:, 1:], cache)
  expected = jit(lambda params, x: whole(params, x, CONFIG, tiling))(_params(), x)
  np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), expected, atol=1e-5)


def test_bad_tilings_are_told():
  with pytest.raises(UserError, match="0 < overlap < size"):
    Tiling(8, 8)
  x = jnp.asarray(_smooth(1, 16, 24))
  _, cache = vae_tiling.decode_chunk(_params(), x, None, CONFIG, Tiling(16, 8))
  with pytest.raises(UserError, match="belongs to 2 tiles"):
    vae_tiling.decode_chunk(_params(), x, cache, CONFIG, Tiling(12, 4))
  with pytest.raises(UserError, match="multiples of 2"):
    vae_tiling.encode(_params(), jnp.zeros((1, 1, 15, 24, 3)), CONFIG, TILING)
