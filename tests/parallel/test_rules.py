"""Sharding rules: large weights along their largest dimension, a state leaf by leaf."""

import jax
import jax.numpy as jnp
import pytest

from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.parallel.rules import fsdp_spec, state_shardings

P = jax.P


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
  ],
)
def test_weights_are_split_along_their_largest_dimension(shape, size, min_shard, spec):
  assert fsdp_spec(shape, size, min_shard) == spec


def test_a_state_is_split_leaf_by_leaf():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  tree = {
    "big": jax.ShapeDtypeStruct((8, 16), jnp.float32),
    "small": jax.ShapeDtypeStruct((3,), jnp.float32),
    "none": None,
  }
  found = state_shardings(tree, mesh, min_shard=100)
  assert (
    found["big"].spec == P(None, "fsdp") and found["small"].spec == P() and found["none"] is None
  )
  placed = jax.device_put(jnp.zeros((8, 16)), found["big"])
  assert {shard.data.shape for shard in placed.addressable_shards} == {(8, 4)}
