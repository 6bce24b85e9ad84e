"""Sharding rules: one table for parameters, what the optimizer keeps of them, pipelines and
batches, and the rules that a network brings.
"""

import ast
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import hiar_jax
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.parallel.rules import leaf_sharding, tree_shardings
from hiar_jax.training import state as states
from tests.helpers import tiny

P = jax.P
PACKAGE = pathlib.Path(hiar_jax.__file__).parent


def mesh_of(**sizes: int) -> jax.sharding.AbstractMesh:
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
  "shape, size, min_shard, spec",
  [
    ((64, 128), 4, 1, P(None, "fsdp")),  # the largest dimension
    ((128, 64), 4, 1, P("fsdp")),
    ((64, 130), 4, 1, P("fsdp")),  # the largest that divides
    ((3, 5), 4, 1, P()),
    ((64, 128), 1, 1, P()),  # nothing to split over
    ((64, 128), 4, 64 * 128, P(None, "fsdp")),
    ((64, 128), 4, 64 * 128 + 1, P()),  # too small to be worth it
    ((2, 64, 64), 8, 1, P(None, "fsdp")),  # the first of equals
    ((), 4, 0, P()),
    ((64, 128), 4, None, P()),
  ],
)
def test_weights_are_split_along_their_largest_dimension(shape, size, min_shard, spec):
  mesh = mesh_of(data=1, fsdp=size)
  assert leaf_sharding("w", mesh, shape=shape, min_shard=min_shard).spec == spec


def test_a_state_is_split_leaf_by_leaf():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  tree = {
    "big": jax.ShapeDtypeStruct((8, 16), jnp.float32),
    "small": jax.ShapeDtypeStruct((3,), jnp.float32),
    "none": None,
  }
  found = tree_shardings(tree, mesh, min_shard=100)
  assert (
    found["big"].spec == P(None, "fsdp") and found["small"].spec == P() and found["none"] is None
  )
  placed = jax.device_put(jnp.zeros((8, 16)), found["big"])
  assert {shard.data.shape for shard in placed.addressable_shards} == {(8, 4)}


# another network's names and rules: stacked as lists, attention in one matrix
RULES = (
  ("blocks/*/qkv/w", (None, "tensor")),
  ("blocks/[0]/out/w", ("tensor", "fsdp")),
  ("blocks/*/out/w", (("tensor", "sequence"),)),
  ("past/kv/*", ("level", ("tensor", "sequence"))),
)
OTHER = {
  "blocks": [
    {"qkv": {"w": jnp.zeros((8, 24)), "b": jnp.zeros(24)}, "out": {"w": jnp.zeros((8, 8))}}
  ]
  * 2,
  "latents": jnp.zeros((8, 8)),  # a parameter, whatever the pipeline calls so
}


@pytest.mark.parametrize(
  "sizes, min_shard, qkv, first, out",
  [
    ({"tensor": 2, "sequence": 2}, None, P(None, "tensor"), P("tensor"), P(("tensor", "sequence"))),
    ({"tensor": 4}, None, P(None, "tensor"), P("tensor"), P("tensor")),
    ({"tensor": 16}, None, P(), P(), P()),  # more than there is to split
    ({"data": 8}, None, P(), P(), P()),
    # a rule first, then `fsdp` along what is left of the large ones
    ({"fsdp": 2, "tensor": 2}, 100, P("fsdp", "tensor"), P("tensor", "fsdp"), P("tensor")),
    ({"fsdp": 2}, 1, P(None, "fsdp"), P(None, "fsdp"), P("fsdp")),
  ],
)
def test_a_network_brings_its_own_rules(sizes, min_shard, qkv, first, out):
  found = tree_shardings(OTHER, mesh_of(**sizes), RULES, min_shard=min_shard)
  specs = jax.tree.map(lambda sharding: sharding.spec, found)
  assert [block["qkv"]["w"] for block in specs["blocks"]] == [qkv, qkv]
  assert [block["out"]["w"] for block in specs["blocks"]] == [first, out]
  if min_shard is None:
    assert specs["blocks"][0]["qkv"]["b"] == specs["latents"] == P()


def test_what_the_optimizer_keeps_lies_where_its_parameter_does():
  optimizer = optax.adamw(1e-3)
  state = jax.eval_shape(lambda: states.create_state(jax.random.key(0), OTHER, optimizer))
  found = tree_shardings(state, mesh_of(fsdp=2, tensor=2), RULES, min_shard=1)
  of_params = jax.tree.map(lambda sharding: sharding.spec, found.params)
  assert of_params["blocks"][0]["qkv"]["w"] == P("fsdp", "tensor")
  moments = found.opt_state[0]
  for tree in (found.ema, moments.mu, moments.nu):
    assert jax.tree.map(lambda sharding: sharding.spec, tree) == of_params
  assert found.step.spec == found.key.spec == moments.count.spec == P()


@pytest.mark.parametrize(
  "path, spec",
  [
    ("pipeline/latents", P("level", None, None, "sequence")),
    ("pipeline/context", P("level", None, None, "sequence")),
    ("pipeline/past/latents", P("level", None, None, "sequence")),
    ("pipeline/past/positions", P("level")),
    ("pipeline/past/kv/self/k", P("level", ("tensor", "sequence"))),
    ("pipeline/texts", P()),
    ("batch/trajectories/text", P()),
  ],
)
def test_a_pipelines_arrays(path, spec):
  assert leaf_sharding(path, mesh_of(level=2, tensor=2, sequence=2), RULES).spec == spec


def test_a_networks_kv_without_a_rule_are_split_over_levels():
  assert leaf_sharding("pipeline/past/kv/k", mesh_of(level=2, tensor=2)).spec == P("level")


def test_batches_are_split_over_all_devices_that_train():
  mesh = mesh_of(data=2, fsdp=4)
  assert leaf_sharding("batch/trajectories/text", mesh).spec == P(("data", "fsdp"))
  assert leaf_sharding("batch/text", mesh, shape=(12, 3)).spec == P()  # 8 do not divide 12


def test_every_rule_of_the_dit_splits_something():
  """A pattern that misses its parameter would leave it whole on every device, in silence."""
  mesh = mesh_of(level=2, tensor=2, sequence=1)
  state = {"params": tiny.params(), "past": {"kv": {"k": jnp.zeros((2, 2, 1, 3, 2, 2, 8))}}}
  for rule in tiny.CONFIG.sharding_rules:
    found = jax.tree.leaves(tree_shardings(state, mesh, (rule,)))
    assert any(sharding.spec for sharding in found), rule


@pytest.mark.parametrize(
  "axes, said",
  [
    (("tensr",), "w: unknown axis tensr; expected one of data, fsdp, level"),
    ((None, None, "tensor"), r"w: a rule gives 3 axes to an array of shape \(4, 4\)"),
  ],
)
def test_a_wrong_rule_is_said(axes, said):
  with pytest.raises(ValueError, match=said):
    leaf_sharding("w", mesh_of(tensor=2), (("w", axes),), shape=(4, 4))


def test_nobody_else_says_where_an_array_lies():
  found = []
  for path in PACKAGE.rglob("*.py"):
    if path.parent.name != "parallel":
      for node in ast.walk(ast.parse(path.read_text())):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.rpartition(".")[2] in {"P", "PartitionSpec", "NamedSharding"}:
          found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {called}")
  assert not found, "\n".join(found)
