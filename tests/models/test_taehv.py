"""The tiny autoencoder as a stream, and its published tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.conversion.key_maps import shape_here
from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
from hiar_jax.errors import UserError
from hiar_jax.models import taehv
from tests.helpers.published_params import from_published, to_published
from tests.helpers.slow_cases import slow

CONFIG = taehv.TinyVAEConfig(z_dim=3, encoder_width=6, decoder_widths=(8, 6, 4, 5), blocks=2)
FRAMES = 4  # latent; 13 pixel frames
# compiles twice as fast
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
ROUNDING = 1e-5  # of the largest value

# four whole groups
VIDEO = np.tanh(np.random.default_rng(0).normal(size=(2, 16, 16, 24, 3))).astype(np.float32)
LATENTS = np.random.default_rng(1).normal(size=(2, FRAMES, 2, 3, 3)).astype(np.float32)
CODERS = {
  "encode": (taehv.encode_chunk, VIDEO, 4),
  "decode": (taehv.decode_chunk, LATENTS, 1),
}
either = pytest.mark.parametrize("way", CODERS)


@functools.cache
def _params():
  """Random weights with random biases, and pixels around grey, so that clipping hides nothing."""
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(
    lambda leaf: leaf + 0.05 * draw(size=leaf.shape).astype(np.float32),
    jax.device_get(jax.jit(lambda: taehv.init(CONFIG, jax.random.key(0)))()),
  )
  last = params["decoder"]["conv_out"]
  return params | {
    "decoder": params["decoder"]
    | {"conv_out": {"kernel": 0.01 * last["kernel"], "bias": last["bias"] + 0.5}}
  }


@functools.cache
def _jitted(way):
  return jit(lambda params, x, memory: CODERS[way][0](params, x, memory, CONFIG))


@functools.cache
def _whole(way):
  return np.asarray(_jitted(way)(_params(), CODERS[way][1], None)[0])


def _streamed(way, cuts):
  """Result and last memory of coding pieces of `cuts` latent frames."""
  _, x, frames = CODERS[way]
  results, memory, at = [], None, 0
  for cut in cuts:
    y, memory = _jitted(way)(_params(), x[:, at : at + cut * frames], memory)
    results.append(y)
    at += cut * frames
  assert at == x.shape[1]
  return np.concatenate(results, axis=1), memory


def _close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * np.abs(b).max())


def test_shapes_and_range():
  assert _whole("encode").shape == LATENTS.shape
  pixels = _whole("decode")
  assert pixels.shape == (2, 13, 16, 24, 3)
  # nothing below was clipped
  assert 0.01 < np.abs(pixels).mean() < 0.5 and np.abs(pixels).max() < 1


@either
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 2), (1, 2, 1)])
def test_any_cutting_gives_the_whole(way, cuts):
  _close(_streamed(way, cuts)[0], _whole(way))


@either
def test_the_memory_does_not_know_how_the_video_was_cut(way):
  (_, one), (_, other) = _streamed(way, (1, 1, 1, 1)), _streamed(way, (4,))
  assert len(jax.tree.leaves(one)) == 6  # one a block
  assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
  jax.tree.map(_close, one, other)


@pytest.mark.parametrize(
  ("chunk", "unroll"), [(None, False), (1, True), *slow((1, False), (2, False))]
)
def test_whole_functions(chunk, unroll):
  decode = jit(lambda params, z: taehv.decode(params, z, CONFIG, chunk, unroll))
  _close(decode(_params(), LATENTS), _whole("decode"))
  encode = jit(lambda params, x: taehv.encode(params, x, CONFIG, chunk, unroll))
  # as published: the last frame fills the last group
  filled = np.concatenate([VIDEO[:, :13], *[VIDEO[:, 12:13]] * 3], axis=1)
  _close(encode(_params(), VIDEO[:, :13]), _jitted("encode")(_params(), filled, None)[0])


@pytest.mark.parametrize("cut", range(1, FRAMES))
def test_decoding_is_causal(cut):
  """Exactly, not nearly; and what follows the change does change."""
  z = LATENTS.copy()
  z[:, cut:] = -z[:, cut:] + 1
  after, whole = np.asarray(_jitted("decode")(_params(), z, None)[0]), _whole("decode")
  same = 1 + 4 * (cut - 1)
  np.testing.assert_array_equal(after[:, :same], whole[:, :same])
  assert (np.abs(after - whole).max(axis=(0, 2, 3, 4))[same:] > 1e-4).all()


def test_a_stream_can_be_left_and_taken_up():
  _, memory = _jitted("decode")(_params(), LATENTS[:, :1], None)
  straight, _ = _jitted("decode")(_params(), LATENTS[:, 1:2], memory)
  resumed, _ = _jitted("decode")(_params(), LATENTS[:, 1:2], jax.tree.map(np.array, memory))
  np.testing.assert_array_equal(straight, resumed)


def test_pixels_are_clipped_and_latents_bounded():
  bright = jax.tree.map(jnp.asarray, _params())
  bright["decoder"]["conv_out"]["bias"] = jnp.asarray([5.0, -5.0, 0.5])
  pixels = np.asarray(_jitted("decode")(bright, LATENTS, None)[0])
  assert (
    (pixels[..., 0] == 1).all()
    and (pixels[..., 1] == -1).all()
    and np.abs(pixels[..., 2]).max() < 1
  )
  far, further = (
    _jitted("decode")(_params(), np.full_like(LATENTS, value), None)[0] for value in (100, 1000)
  )
  np.testing.assert_array_equal(far, further)


def test_bfloat16_is_near_float32():
  config = taehv.dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
  y, memory = jit(lambda params, z: taehv.decode_chunk(params, z, None, config))(_params(), LATENTS)
  assert y.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(memory)} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert np.abs(y - _whole("decode")).max() < 0.1 * np.abs(_whole("decode")).max()


# -------------------------------------------------------------------------------- published tensors


def published():
  """taew2_1, written out place by place."""
  facts = {
    "encoder.0.weight": (64, 3, 3, 3),
    "encoder.0.bias": (64,),
    "encoder.17.weight": (16, 64, 3, 3),
    "encoder.17.bias": (16,),
  }
  facts |= {
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.1.bias": (256,),
    "decoder.22.weight": (3, 64, 3, 3),
    "decoder.22.bias": (3,),
  }
  facts |= {
    f"encoder.{i}.conv.weight": (64, fan_in, 1, 1) for i, fan_in in ((2, 128), (7, 128), (12, 64))
  }
  facts |= {f"encoder.{i}.weight": (64, 64, 3, 3) for i in (3, 8, 13)}
  facts |= {
    f"decoder.{i}.conv.weight": shape
    for i, shape in ((7, (256, 256, 1, 1)), (13, (256, 128, 1, 1)), (19, (128, 64, 1, 1)))
  }
  facts |= {
    f"decoder.{i}.weight": shape
    for i, shape in ((8, (128, 256, 3, 3)), (14, (64, 128, 3, 3)), (20, (64, 64, 3, 3)))
  }
  blocks = [("encoder", i, 64) for i in (4, 5, 6, 9, 10, 11, 14, 15, 16)]
  blocks += [("decoder", 3 + j, 256) for j in range(3)] + [
    ("decoder", 9 + j, 128) for j in range(3)
  ]
  blocks += [("decoder", 15 + j, 64) for j in range(3)]
  for half, i, width in blocks:
    for j, fan_in in ((0, 2 * width), (2, width), (4, width)):
      facts |= {
        f"{half}.{i}.conv.{j}.weight": (width, fan_in, 3, 3),
        f"{half}.{i}.conv.{j}.bias": (width,),
      }
  return facts


def test_every_published_tensor_is_accounted_for():
  facts = published()
  assert {rule.name: rule.shape for rule in tiny_vae_key_map(taehv.TinyVAEConfig())} == facts
  assert len(facts) == 128 and sum(int(np.prod(shape)) for shape in facts.values()) == 11_315_539


def test_the_rules_fill_the_model_of_the_real_size():
  rules = tiny_vae_key_map(taehv.TinyVAEConfig())
  leaves = jax.tree_util.tree_leaves_with_path(taehv.abstract_params(taehv.TinyVAEConfig()))
  assert {rule.path: shape_here(rule) for rule in rules} == {
    tuple(key.key for key in path): leaf.shape for path, leaf in leaves
  }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_there_and_back_bit_for_bit(dtype):
  rng = np.random.default_rng(0)
  named = {
    rule.name: rng.normal(size=rule.shape).astype(jnp.dtype(dtype))
    for rule in tiny_vae_key_map(CONFIG)
  }
  params = from_published(named, tiny_vae_key_map(CONFIG), "tiny VAE")
  back = to_published(jax.device_put(params), tiny_vae_key_map(CONFIG), "tiny VAE")
  assert list(back) == list(named)
  assert all(
    back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes()
    for name, array in named.items()
  )


def test_a_clip_of_the_real_size_keeps_its_shape():
  config = taehv.TinyVAEConfig()
  params, latents = (
    taehv.abstract_params(config),
    jax.ShapeDtypeStruct((1, 21, 60, 104, 16), np.float32),
  )
  there = jax.eval_shape(lambda p, z: taehv.decode(p, z, config), params, latents)
  back = jax.eval_shape(lambda p, x: taehv.encode(p, x, config), params, there)
  assert there.shape == (1, 81, 480, 832, 3) and back.shape == latents.shape


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  ("function", "shape", "words"),
  [
    (taehv.encode, (1, 5, 20, 24, 3), "multiples of 8 (nearest: 16x24)"),
    (taehv.encode, (1, 4, 16, 24, 3), "expected 1 + 4 m frames"),
    (taehv.decode, (1, 1, 2, 3, 16), "expected [b f h w 3]"),
  ],
)
def test_sizes_that_do_not_fit(function, shape, words):
  with pytest.raises(UserError) as error:
    function(_params(), jnp.zeros(shape), CONFIG)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_pieces_that_do_not_fit():
  with pytest.raises(UserError, match="5 frames do not fit; a piece to encode has 4 m frames"):
    taehv.encode_chunk(_params(), jnp.zeros((1, 5, 16, 24, 3)), None, CONFIG)
  _, memory = _streamed("decode", (4,))
  with pytest.raises(UserError, match="cache belongs to a batch of 2 with frames of 2x3"):
    taehv.decode_chunk(_params(), jnp.zeros((1, 1, 2, 3, 3)), memory, CONFIG)
  with pytest.raises(UserError, match="chunk=0"):
    taehv.decode(_params(), jnp.asarray(LATENTS), CONFIG, chunk=0)


def test_sizes_that_make_no_model():
  with pytest.raises(UserError, match="2 and 3 entries, expected 3 each"):
    taehv.TinyVAEConfig(temporal_downsample=(True, True))
  with pytest.raises(UserError, match="equally often"):
    taehv.TinyVAEConfig(temporal_upsample=(False, False, True))


def test_tensors_that_do_not_fit():
  named = {rule.name: np.zeros(rule.shape, np.float16) for rule in tiny_vae_key_map(CONFIG)}
  del named["decoder.1.bias"]
  with pytest.raises(UserError, match=r"tiny VAE.*1 missing \(decoder.1.bias\)"):
    from_published(named, tiny_vae_key_map(CONFIG), "tiny VAE")
