"""UMT5: distance buckets, what the mask hides, and the published tensors of the real size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.conversion.key_maps import shape_here
from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.errors import UserError
from hiar_jax.models import umt5
from tests.helpers.published_params import from_published, to_published

SMALL = umt5.UMT5Config(vocab=50, dim=16, dim_attn=24, dim_ffn=20, num_heads=3, num_layers=3)
IDS = np.random.default_rng(0).integers(2, 50, size=(2, 9)).astype(np.int32)
MASK = (np.arange(9) < np.asarray([[9], [4]])).astype(np.int32)
layouts = pytest.mark.parametrize("layout", ["original", "diffusers"])


def _named(layout="original", dtype=np.float32):
  rng = np.random.default_rng(1)
  return {
    rule.name: rng.normal(size=rule.shape).astype(dtype) for rule in umt5_key_map(SMALL, layout)
  }


@functools.cache
def _params():
  named = _named()
  scaled = {
    name: array / np.sqrt(array.shape[-1]) if array.ndim == 2 else array
    for name, array in named.items()
  }
  return from_published(scaled, umt5_key_map(SMALL), "UMT5")


@functools.cache
def _encode(config=SMALL):
  return jax.jit(lambda params, ids, mask: umt5.encode_text(params, ids, mask, config))


def test_near_distances_have_buckets_of_their_own_and_far_ones_share():
  buckets = umt5.relative_buckets(300, 32)
  assert list(buckets[:10, 0][::-1]) == [8, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # keys behind
  assert list(buckets[0, :10]) == [0, 17, 18, 19, 20, 21, 22, 23, 24, 24]  # keys ahead
  assert (np.diff(buckets[0, 1:]) >= 0).all() and set(buckets.ravel()) == set(range(32)) - {16}
  assert buckets[0, 90] == 30 and (buckets[0, 128:] == 31).all() and (buckets[128:, 0] == 15).all()
  # At powers of two the published float32 logarithms decide; these are their answers.
  assert [buckets[0, d] for d in (11, 12, 15, 16, 22, 23, 31, 32, 63, 64)] == [
    24,
    25,
    25,
    26,
    26,
    27,
    27,
    28,
    29,
    30,
  ]


def test_padding_is_zero_and_unseen():
  text = np.asarray(_encode()(_params(), IDS, MASK))
  assert (
    text.shape == (2, 9, 16)
    and (text[1, 4:] == 0).all()
    and (np.abs(text[1, :4]).max(axis=-1) > 0).all()
  )
  other = IDS.copy()
  other[1, 4:] = 7
  np.testing.assert_array_equal(_encode()(_params(), other, MASK), text)
  other[1, 3] = 1 + other[1, 3] % 48
  assert (np.abs(_encode()(_params(), other, MASK) - text)[1, :4].max(axis=-1) > 0).all()


def test_a_prompt_does_not_feel_its_batch_or_its_padding():
  text = _encode()(_params(), IDS, MASK)
  alone = _encode()(_params(), IDS[1:, :4], MASK[1:, :4])
  np.testing.assert_allclose(alone[0], text[1, :4], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_bfloat16_is_near_float32():
  config = umt5.dataclasses.replace(SMALL, dtype=jnp.bfloat16)
  text, exact = _encode(config)(_params(), IDS, MASK), _encode()(_params(), IDS, MASK)
  assert text.dtype == jnp.bfloat16
  assert np.abs(text - exact).max() < 0.1 * np.abs(exact).max()


def published():
  """models_t5_umt5-xxl-enc-bf16.pth, written out."""
  facts = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
  for i in range(24):
    layer = {f"attn.{p}": (4096, 4096) for p in "qkvo"} | {"norm1": (4096,), "norm2": (4096,)}
    layer |= {"ffn.gate.0": (10240, 4096), "ffn.fc1": (10240, 4096), "ffn.fc2": (4096, 10240)}
    layer |= {"pos_embedding.embedding": (32, 64)}
    facts |= {f"blocks.{i}.{name}.weight": shape for name, shape in layer.items()}
  return facts


def test_every_published_tensor_is_accounted_for():
  facts = published()
  assert {rule.name: rule.shape for rule in umt5_key_map(umt5.UMT5Config())} == facts
  assert len(facts) == 242 and sum(int(np.prod(shape)) for shape in facts.values()) == 5_680_910_336


@layouts
def test_the_rules_fill_the_model_of_the_real_size(layout):
  rules = umt5_key_map(umt5.UMT5Config(), layout)
  here = {
    tuple(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(umt5.abstract_params(umt5.UMT5Config()))
  }
  expected = {
    rule.path: shape_here(rule) if rule.layer is None else (24, *shape_here(rule)) for rule in rules
  }
  assert here == expected


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_bit_for_bit(layout, dtype):
  named = _named(layout, jnp.dtype(dtype))
  params = from_published(named, umt5_key_map(SMALL, layout), "UMT5")
  back = to_published(jax.device_put(params), umt5_key_map(SMALL, layout), "UMT5")
  assert list(back) == list(named)
  for name, array in named.items():
    assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


def test_misfits_are_listed():
  named = _named()
  with pytest.raises(UserError, match=r"10 missing \(blocks.3.attn.k.weight.* and 6 more\)"):
    from_published(named, umt5_key_map(umt5.dataclasses.replace(SMALL, num_layers=4)), "UMT5")
  with pytest.raises(UserError, match="one dtype"):
    from_published(
      named | {"blocks.1.norm1.weight": np.ones(16, np.float16)}, umt5_key_map(SMALL), "UMT5"
    )
  with pytest.raises(UserError, match="unknown layout"):
    umt5_key_map(SMALL, "hf")
  with pytest.raises(UserError, match="no multiple of num_heads=5"):
    umt5.UMT5Config(num_heads=5)
