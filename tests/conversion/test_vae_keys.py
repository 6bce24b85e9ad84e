"""Published tensors of the VAE: the full lists of names and shapes, both layouts, there and
back.
"""

import jax
import numpy as np
import pytest

from hiar_jax.conversion.key_maps import shape_here
from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.errors import UserError
from hiar_jax.models import vae
from tests.helpers.published_params import from_published, to_published

SMALL = vae.VAEConfig(dim=2)
layouts = pytest.mark.parametrize("layout", ["original", "diffusers"])


def _conv(name, *shape):
  return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _res(name, fan_in, width):
  facts = {
    f"{name}.residual.0.gamma": (fan_in, 1, 1, 1),
    f"{name}.residual.3.gamma": (width, 1, 1, 1),
  }
  facts |= _conv(f"{name}.residual.2", width, fan_in, 3, 3, 3) | _conv(
    f"{name}.residual.6", width, width, 3, 3, 3
  )
  return facts | (_conv(f"{name}.shortcut", width, fan_in, 1, 1, 1) if fan_in != width else {})


def _ends(half, first, width, last, out):
  facts = _conv(f"{half}.conv1", first, {"encoder": 3, "decoder": 16}[half], 3, 3, 3)
  facts |= _res(f"{half}.middle.0", width, width) | _res(f"{half}.middle.2", width, width)
  facts |= {f"{half}.middle.1.norm.gamma": (width, 1, 1)}
  facts |= _conv(f"{half}.middle.1.to_qkv", 3 * width, width, 1, 1) | _conv(
    f"{half}.middle.1.proj", width, width, 1, 1
  )
  return (
    facts | {f"{half}.head.0.gamma": (last, 1, 1, 1)} | _conv(f"{half}.head.2", out, last, 3, 3, 3)
  )


def _resample(name, width, out, time):
  return _conv(f"{name}.resample.1", out, width, 3, 3) | (
    _conv(f"{name}.time_conv", *time, 3, 1, 1) if time else {}
  )


def published(d):
  """Wan2.1_VAE.pth for width d = 96, written out place by place."""
  facts = _conv("conv1", 32, 32, 1, 1, 1) | _conv("conv2", 16, 16, 1, 1, 1)
  facts |= _ends("encoder", d, 4 * d, 4 * d, 32) | _ends("decoder", 4 * d, 4 * d, d, 3)
  down = {0: (d, d), 1: (d, d), 3: (d, 2 * d), 4: (2 * d, 2 * d), 6: (2 * d, 4 * d)}
  down |= {i: (4 * d, 4 * d) for i in (7, 9, 10)}
  for i, (fan_in, width) in down.items():
    facts |= _res(f"encoder.downsamples.{i}", fan_in, width)
  for i, width, time in ((2, d, None), (5, 2 * d, (2 * d, 2 * d)), (8, 4 * d, (4 * d, 4 * d))):
    facts |= _resample(f"encoder.downsamples.{i}", width, width, time)
  up = {i: (4 * d, 4 * d) for i in (0, 1, 2, 5, 6)} | {4: (2 * d, 4 * d)}
  up |= {i: (2 * d, 2 * d) for i in (8, 9, 10)} | {i: (d, d) for i in (12, 13, 14)}
  for i, (fan_in, width) in up.items():
    facts |= _res(f"decoder.upsamples.{i}", fan_in, width)
  for i, width, time in ((3, 4 * d, (8 * d, 4 * d)), (7, 4 * d, (8 * d, 4 * d)), (11, 2 * d, None)):
    facts |= _resample(f"decoder.upsamples.{i}", width, width // 2, time)
  return facts


def test_every_published_tensor_is_accounted_for():
  facts = published(96)
  assert {rule.name: rule.shape for rule in vae_key_map(vae.VAEConfig())} == facts
  assert len(facts) == 194 and sum(int(np.prod(shape)) for shape in facts.values()) == 126_892_531


@layouts
def test_the_rules_fill_the_model_of_the_real_size(layout):
  rules = vae_key_map(vae.VAEConfig(), layout)
  leaves = jax.tree_util.tree_leaves_with_path(vae.abstract_params(vae.VAEConfig()))
  assert {rule.path: shape_here(rule) for rule in rules} == {
    tuple(key.key for key in path): leaf.shape for path, leaf in leaves
  }
  assert len({rule.name for rule in rules}) == len(rules) == len(leaves)


def test_both_layouts_hold_the_same_tensors():
  first, second = (
    {rule.path: rule.shape for rule in vae_key_map(SMALL, layout)}
    for layout in ("original", "diffusers")
  )
  assert first == second


def test_a_clip_of_the_real_size_keeps_its_shape():
  config = vae.VAEConfig()
  latents = jax.ShapeDtypeStruct((1, 21, 60, 104, 16), np.float32)
  there = jax.eval_shape(
    lambda p, z: vae.decode(p, z, config), vae.abstract_params(config), latents
  )
  back = jax.eval_shape(lambda p, x: vae.encode(p, x, config), vae.abstract_params(config), there)
  assert there.shape == (1, 81, 480, 832, 3) and back.shape == latents.shape


def _named(layout, dtype="float32"):
  rng = np.random.default_rng(0)
  return {
    rule.name: rng.normal(size=rule.shape).astype(dtype) for rule in vae_key_map(SMALL, layout)
  }


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_bit_for_bit(layout, dtype):
  named = _named(layout, jax.numpy.dtype(dtype))
  params = from_published(named, vae_key_map(SMALL, layout), "VAE")
  back = to_published(jax.device_put(params), vae_key_map(SMALL, layout), "VAE")
  assert list(back) == list(named)
  for name, array in named.items():
    assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
    assert back[name].tobytes() == array.tobytes(), name


def test_misfits_are_listed():
  named = _named("original")
  named["extra.weight"] = named.pop("conv1.bias")
  with pytest.raises(UserError, match=r"1 missing \(conv1.bias\); 1 left over \(extra.weight\)"):
    from_published(named, vae_key_map(SMALL), "VAE")
  with pytest.raises(UserError, match=r"conv1.weight has shape .* asks for"):
    from_published(_named("original"), vae_key_map(vae.dataclasses.replace(SMALL, dim=4)), "VAE")
  with pytest.raises(UserError, match="unknown layout 'torch'"):
    vae_key_map(SMALL, "torch")
  params = from_published(_named("original"), vae_key_map(SMALL), "VAE")
  with pytest.raises(UserError, match="has shape"):
    to_published(params, vae_key_map(vae.dataclasses.replace(SMALL, dim=4)), "VAE")
  del params["quant"]
  with pytest.raises(UserError, match="differ at quant"):
    to_published(params, vae_key_map(SMALL), "VAE")
