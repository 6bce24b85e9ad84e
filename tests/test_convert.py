"""Published names and shapes, there and back."""

import dataclasses

import jax
import numpy as np
import pytest

from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.conversion.key_maps import shape_here
from hiar_jax.errors import UserError
from hiar_jax.models import dit
from tests.helpers import tiny
from tests.helpers.published_params import from_published, to_published

# Every size differs, so that no two axes can be mistaken for each other.
CONFIG = dit.DiTConfig(
  dim=12,
  ffn_dim=20,
  num_heads=3,
  num_layers=2,
  patch=(1, 2, 3),
  channels=5,
  text_dim=7,
  freq_dim=10,
)
SIZES = {
  "1.3B": dit.DiTConfig(),
  "14B": dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
# Wan2.1's state dict, module by module: (name, has a bias).
OUTER = [
  "patch_embedding",
  "text_embedding.0",
  "text_embedding.2",
  "time_embedding.0",
  "time_embedding.2",
] + ["time_projection.1", "head.head"]
ATTENTION = [f"{part}.{p}" for part in ("self_attn", "cross_attn") for p in "qkvo"]
NORMS = [f"{part}.norm_{p}.weight" for part in ("self_attn", "cross_attn") for p in "qk"]


def published_names(layers: int) -> set[str]:
  with_bias = OUTER + [
    f"blocks.{i}.{name}" for i in range(layers) for name in [*ATTENTION, "norm3", "ffn.0", "ffn.2"]
  ]
  names = {f"{name}.{kind}" for name in with_bias for kind in ("weight", "bias")} | {
    "head.modulation"
  }
  return names | {f"blocks.{i}.{name}" for i in range(layers) for name in [*NORMS, "modulation"]}


def published_arrays(config=CONFIG) -> dict[str, np.ndarray]:
  return {rule.name: tiny.random(i, *rule.shape) for i, rule in enumerate(dit_key_map(config))}


@pytest.mark.parametrize(
  ("size", "count", "parameters"), [("1.3B", 825, 1_418_996_800), ("14B", 1095, 14_288_491_584)]
)
def test_published_sizes(size, count, parameters):
  shapes = {rule.name: rule.shape for rule in dit_key_map(SIZES[size])}
  assert shapes.keys() == published_names(SIZES[size].num_layers) and len(shapes) == count
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_published_shapes_of_the_small_model():
  shapes = {rule.name: rule.shape for rule in dit_key_map(SIZES["1.3B"])}
  expected = {
    "patch_embedding.weight": (1536, 16, 1, 2, 2),
    "text_embedding.0.weight": (1536, 4096),
    "time_embedding.0.weight": (1536, 256),
    "time_projection.1.weight": (9216, 1536),
    "head.head.weight": (64, 1536),
    "head.modulation": (1, 2, 1536),
    "blocks.29.modulation": (1, 6, 1536),
    "blocks.0.ffn.0.weight": (8960, 1536),
    "blocks.0.ffn.2.weight": (1536, 8960),
    "blocks.0.self_attn.norm_q.weight": (1536,),
    "blocks.7.norm3.bias": (1536,),
    "blocks.0.cross_attn.k.weight": (1536, 1536),
  }
  assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize("config", [CONFIG, *SIZES.values()], ids=["odd", *SIZES])
def test_every_parameter_has_a_published_place(config):
  """The module's own shapes (nothing is allocated) are those that the rules make of the published
  ones.
  """
  rules = {".".join(rule.path): rule for rule in dit_key_map(config)}
  ours = {
    path: shape_here(rule) if rule.layer is None else (config.num_layers, *shape_here(rule))
    for path, rule in rules.items()
  }
  leaves = jax.tree_util.tree_leaves_with_path(
    jax.eval_shape(lambda: config.init(jax.random.key(0)))
  )
  assert ours == {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def test_there_and_back_bit_for_bit():
  named = published_arrays()
  params = from_published(named, dit_key_map(CONFIG), "DiT")
  like = jax.eval_shape(lambda: CONFIG.init(jax.random.key(0)))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, like)
  back = to_published(params, dit_key_map(CONFIG), "DiT")
  assert back.keys() == named.keys()
  for name, array in named.items():
    assert back[name].tobytes() == array.tobytes() and back[name].shape == array.shape, name


def test_layouts():
  """A linear layer is transposed; the patch convolution reads (row, column, channel); layers are
  stacked in order.
  """
  named = published_arrays()
  params = from_published(named, dit_key_map(CONFIG), "DiT")
  weight = named["blocks.1.ffn.0.weight"]
  np.testing.assert_array_equal(params["layers"]["mlp_in"]["kernel"][1], weight.T)
  kernel = params["patch_embedding"]["kernel"].reshape(2, 3, 5, 12)
  assert kernel[1, 2, 3, 4] == named["patch_embedding.weight"][4, 3, 0, 1, 2]
  scale = params["layers"]["text_attention"]["norm_k"]["scale"][0]
  np.testing.assert_array_equal(scale, named["blocks.0.cross_attn.norm_k.weight"])
  np.testing.assert_array_equal(
    params["layers"]["norm_text"]["bias"][1], named["blocks.1.norm3.bias"]
  )
  np.testing.assert_array_equal(params["head_modulation"], named["head.modulation"])


def test_misfits_are_listed():
  named = published_arrays()
  del named["blocks.1.ffn.2.bias"]
  named["blocks.0.self_attn.q.lora"] = np.zeros(3)
  with pytest.raises(
    UserError, match=r"missing \(blocks.1.ffn.2.bias\).*left over \(blocks.0.self_attn.q.lora\)"
  ) as error:
    from_published(named, dit_key_map(CONFIG), "DiT")
  assert "\n" not in str(error.value)


def test_another_shape_is_refused():
  named = published_arrays()
  named["head.head.weight"] = np.zeros((4, 12))
  with pytest.raises(
    UserError, match=r"head.head.weight has shape \(4, 12\), the config asks for \(30, 12\)"
  ):
    from_published(named, dit_key_map(CONFIG), "DiT")


def test_another_depth_is_refused():
  with pytest.raises(UserError, match=r"left over \(blocks.1"):
    from_published(
      published_arrays(), dit_key_map(dataclasses.replace(CONFIG, num_layers=1)), "DiT"
    )
