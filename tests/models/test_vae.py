"""The VAE as a stream: any cutting gives the whole, nothing depends on later frames, bad sizes are
told.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import vae
from tests.helpers.slow_cases import slow

CONFIG = vae.VAEConfig(
  dim=4,
  z_dim=3,
  dim_mult=(1, 1, 2),
  num_res_blocks=1,
  temporal_downsample=(True, True),
  latents_mean=(0.1, -0.2, 0.3),
  latents_std=(1.5, 0.5, 2.0),
)
FRAMES = 4  # latent; 13 pixel frames
# compiles twice as fast
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ROUNDING = 1e-5  # of the largest value: float32, through some twenty layers


@functools.cache
def _params():
  """Random weights with random gains and biases: zeros and ones would hide mistakes."""
  draw = np.random.default_rng(0).normal
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * draw(size=leaf.shape).astype(np.float32),
    jax.device_get(jit(lambda: vae.init(CONFIG, jax.random.key(0)))()),
  )


VIDEO = np.tanh(np.random.default_rng(0).normal(size=(2, 1 + 4 * (FRAMES - 1), 8, 12, 3))).astype(
  np.float32
)
LATENTS = np.random.default_rng(1).normal(size=(2, FRAMES, 2, 3, 3)).astype(np.float32)
CODERS = {"encode": (vae.encode_chunk, VIDEO, 4), "decode": (vae.decode_chunk, LATENTS, 1)}
either = pytest.mark.parametrize("way", CODERS)


@functools.cache
def _jitted(way):
  return jit(lambda params, x, cache: CODERS[way][0](params, x, cache, CONFIG))


@functools.cache
def _whole(way):
  return np.asarray(_jitted(way)(_params(), CODERS[way][1], None)[0])


def _streamed(way, cuts):
  """Result and last cache of coding pieces of `cuts` latent frames."""
  _, x, frames = CODERS[way]
  results, cache, at = [], None, 0
  for cut in cuts:
    size = cut * frames - (frames - 1 if cache is None else 0)
    y, cache = _jitted(way)(_params(), x[:, at : at + size], cache)
    results.append(y)
    at += size
  assert at == x.shape[1]
  return np.concatenate(results, axis=1), cache


@either
def test_shapes(way):
  assert _whole("encode").shape == LATENTS.shape
  assert _whole("decode").shape == VIDEO.shape


@either
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 2), (1, 2, 1)])
def test_any_cutting_gives_the_whole(way, cuts):
  np.testing.assert_allclose(
    _streamed(way, cuts)[0], _whole(way), rtol=0, atol=ROUNDING * np.abs(_whole(way)).max()
  )


@either
def test_the_cache_does_not_know_how_the_video_was_cut(way):
  (_, one), (_, other) = _streamed(way, (1, 1, 1, 1)), _streamed(way, (4,))
  assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * np.abs(b).max()),
    one,
    other,
  )


@either
@pytest.mark.parametrize(
  ("chunk", "unroll"), [(None, False), (1, True), *slow((1, False), (2, False))]
)
def test_whole_functions(way, chunk, unroll):
  coder = {"encode": vae.encode, "decode": vae.decode}[way]
  y = jit(lambda params, x: coder(params, x, CONFIG, chunk, unroll))(_params(), CODERS[way][1])
  np.testing.assert_allclose(y, _whole(way), rtol=0, atol=ROUNDING * np.abs(_whole(way)).max())


@either
@pytest.mark.parametrize("cut", range(1, FRAMES))
def test_later_frames_change_nothing_earlier(way, cut):
  """Exactly, not nearly; and what follows the change does change."""
  x = CODERS[way][1].copy()
  first = cut if way == "decode" else 1 + 4 * (cut - 1)
  x[:, first:] = -x[:, first:] + 1
  after = np.asarray(_jitted(way)(_params(), x, None)[0])
  same = 1 + 4 * (cut - 1) if way == "decode" else cut
  np.testing.assert_array_equal(after[:, :same], _whole(way)[:, :same])
  assert (np.abs(after - _whole(way)).max(axis=(0, 2, 3, 4))[same:] > 1e-3).all()


@either
def test_a_stream_can_be_left_and_taken_up(way):
  """The cache is a plain pytree: through numpy and back, the stream goes on to the same numbers."""
  _, x, frames = CODERS[way]
  _, cache = _jitted(way)(_params(), x[:, :1], None)
  straight, _ = _jitted(way)(_params(), x[:, 1 : 1 + frames], cache)
  resumed, _ = _jitted(way)(_params(), x[:, 1 : 1 + frames], jax.tree.map(np.array, cache))
  np.testing.assert_array_equal(straight, resumed)


@pytest.mark.slow
def test_scan_needs_no_more_memory_for_a_longer_video():
  """Beside the result, which is held up to three times over while it is put together."""

  def extra(frames, chunk):
    decode = jit(lambda params, latents: vae.decode(params, latents, CONFIG, chunk))
    shape = jax.ShapeDtypeStruct((1, frames, 8, 8, 3), jnp.float32)
    analysis = decode.lower(_params(), shape).compile().memory_analysis()
    return analysis.temp_size_in_bytes - 3 * analysis.output_size_in_bytes

  assert extra(9, 1) <= extra(3, 1)
  assert extra(9, None) > 2 * extra(3, None)


def test_latents_are_normalised():
  latents = jnp.asarray(LATENTS)
  np.testing.assert_allclose(
    vae.normalise(vae.denormalise(latents, CONFIG), CONFIG), LATENTS, atol=1e-6
  )
  raw = np.asarray(CONFIG.latents_mean, np.float32) + np.asarray(CONFIG.latents_std, np.float32)
  np.testing.assert_allclose(
    vae.normalise(jnp.asarray(raw)[None, None, None, None], CONFIG), 1.0, atol=1e-6
  )


def test_bfloat16_is_near_float32():
  config = vae.dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
  y, cache = jit(lambda params, x: vae.decode_chunk(params, x, None, config))(_params(), LATENTS)
  assert y.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(cache)} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert np.abs(y - _whole("decode")).max() < 0.1 * np.abs(_whole("decode")).max()


@pytest.mark.parametrize(
  ("way", "axis"), slow(("encode", 2), ("decode", 3)), ids=["encode height", "decode width"]
)
def test_frames_may_be_spread_over_devices(way, axis):
  """The compiler exchanges the seams: frames split over devices give the frames of one device, and
  stay split.
  """
  mesh = jax.make_mesh((4,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.P(*[None] * axis, "space")
  size = (8, 8) if way == "decode" else (32, 32)
  x = jnp.asarray(
    np.random.default_rng(2)
    .normal(size=(1, 2 if way == "decode" else 5, *size, 3))
    .astype(np.float32)
  )
  coder = {"encode": vae.encode, "decode": vae.decode}[way]
  code = jit(lambda params, x: coder(params, x, CONFIG))
  result = code(
    jax.device_put(_params(), jax.NamedSharding(mesh, jax.P())),
    jax.device_put(x, jax.NamedSharding(mesh, spec)),
  )
  assert result.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 5)
  np.testing.assert_allclose(
    result, code(_params(), x), rtol=0, atol=ROUNDING * np.abs(result).max()
  )


@pytest.mark.parametrize(
  ("shape", "cache", "words"),
  [
    ((1, 5, 10, 12, 3), None, "multiples of 4 (nearest: 8x12)"),
    ((1, 4, 8, 12, 3), None, "expected 1 + 4 m frames"),
    ((1, 5, 8, 12, 3), {}, "expected 4 m frames"),
    ((1, 0, 8, 12, 3), None, "0 frames"),
  ],
)
def test_sizes_that_cannot_be_encoded(shape, cache, words):
  with pytest.raises(UserError) as error:
    vae.encode_chunk(_params(), jnp.zeros(shape), cache, CONFIG)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_cache_of_another_video_is_refused():
  _, cache = _streamed("decode", (4,))
  with pytest.raises(UserError, match="cache belongs to a batch of 2"):
    vae.decode_chunk(_params(), jnp.zeros((1, 1, 2, 3, 3)), cache, CONFIG)


def test_other_bad_input():
  with pytest.raises(UserError, match="expected \\[b f h w 3\\]"):
    vae.decode(_params(), jnp.zeros((1, 1, 2, 3, 16)), CONFIG, chunk=None)
  with pytest.raises(UserError, match="chunk=0"):
    vae.decode(_params(), jnp.asarray(LATENTS), CONFIG, chunk=0)
  with pytest.raises(UserError, match="one fewer than dim_mult"):
    vae.VAEConfig(dim_mult=(1, 2))
  with pytest.raises(UserError, match="z_dim=8"):
    vae.VAEConfig(z_dim=8)
