"""Which array lies where, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, check_batch, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import fsdp_spec, state_shardings

P = jax.P


@pytest.mark.parametrize(
  "config, devices, shape",
  [
    (MeshConfig(), 8, (8, 1)),
    (MeshConfig(), 3, (3, 1)),
    (MeshConfig(fsdp=2), 8, (4, 2)),
    (MeshConfig(data=2, fsdp=-1), 8, (2, 4)),
    (MeshConfig(data=2, fsdp=4), 8, (2, 4)),
    (MeshConfig(data=1, fsdp=1), 1, (1, 1)),
  ],
)
def test_mesh_takes_all_devices(config, devices, shape):
  mesh = make_mesh(config, jax.devices()[:devices])
  assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == shape
  assert {d.id for d in mesh.devices.flat} == set(range(devices))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"data": 3}, "mesh data = 3, fsdp = 1 does not fit 8 devices; their product must be 8"),
    ({"data": 16}, "mesh data = 16, fsdp = 1 does not fit 8 devices"),
    ({"fsdp": 16}, "mesh data = -1, fsdp = 16 does not fit 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one of them -1"),
    ({"data": 0}, "sizes of at least 1"),
    ({"mapping": "vmap"}, "mesh.mapping = 'vmap': expected one of jit, pmap"),
    ({"mapping": "pmap", "fsdp": 2}, "mesh.fsdp = 2: pmap replicates the weights"),
  ],
)
def test_a_mesh_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    make_mesh(MeshConfig(**fields))


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


@pytest.mark.parametrize(
  "config", [MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=8)]
)
def test_every_device_gets_rows_of_its_own(config):
  mesh = make_mesh(config)
  rows = np.arange(16 * 3).reshape(16, 3)
  batch = put_batch({"x": rows, "index": np.arange(16)}, mesh)
  np.testing.assert_array_equal(batch["x"], rows)
  parts = [np.asarray(shard.data) for shard in batch["x"].addressable_shards]
  assert {part.shape for part in parts} == {(2, 3)}
  assert sorted(part[0, 0] for part in parts) == list(range(0, 48, 6))


@pytest.mark.parametrize(
  "batch, accumulate, nearest",
  [(12, 1, 16), (11, 1, 8), (1, 1, 8), (24, 2, 32), (39, 1, 40), (8, 2, 16)],
)
def test_a_batch_that_does_not_divide_names_the_nearest(batch, accumulate, nearest):
  mesh = make_mesh(MeshConfig())
  line = (
    rf"teacher.batch = {batch} must be a multiple of {8 * accumulate} \(8 devices x "
    rf"accumulate = {accumulate}\); "
  )
  with pytest.raises(UserError, match=line + f"the nearest is {nearest}$"):
    check_batch(batch, accumulate, mesh, "teacher")
  check_batch(nearest, accumulate, mesh, "teacher")


def count_step(state, batch, frozen, mean):
  total = mean(batch["x"].astype(jnp.float32).mean())
  return {"w": state["w"] + total * frozen["scale"]}, {"loss": total}


@pytest.mark.parametrize("mapping", ["jit", "pmap"])
def test_a_mapped_step_sees_the_whole_batch_on_any_devices(mapping):
  for devices in (1, 4, 8):
    mesh = make_mesh(MeshConfig(mapping=mapping), jax.devices()[:devices])
    state = {"w": jax.device_put(jnp.zeros((16, 16)), replicated(mesh))}
    step = map_step(count_step, state_shardings(state, mesh, 1), mesh, mapping)
    with jax.set_mesh(mesh):
      for _ in range(2):  # the state goes round
        state, metrics = step(
          state, put_batch({"x": np.arange(16.0)}, mesh), {"scale": jnp.float32(2)}
        )
    np.testing.assert_allclose(state["w"], np.full((16, 16), 2 * 2 * 7.5))
    assert float(metrics["loss"]) == 7.5


def test_a_mapped_step_keeps_the_state_where_it_was():
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  shardings = state_shardings({"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}, mesh, 1)
  state = jax.jit(lambda: {"w": jnp.zeros((16, 16))}, out_shardings=shardings)()
  step = map_step(count_step, shardings, mesh)
  after, _ = step(state, put_batch({"x": np.arange(16.0)}, mesh), {"scale": jnp.float32(1)})
  assert after["w"].sharding.spec == P("fsdp")
  assert state["w"].is_deleted()  # its memory was used again
