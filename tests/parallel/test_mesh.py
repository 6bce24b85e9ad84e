"""Which array lies where, on eight virtual devices."""

import dataclasses

import jax
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import MeshConfig, check_batch, make_mesh, put_batch

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
    ({"tensor": 3}, "mesh data = -1, fsdp = 1, tensor = 3 does not fit 8 devices"),
    ({"tensor": 0}, "tensor = 0"),
    ({"sequence": 2, "mapping": "pmap"}, "sequence = 2: pmap gives each device whole examples"),
    ({"ring": 4, "mapping": "pmap"}, "mesh.ring = 4: pmap gives each device whole examples"),
    ({"ring": 3}, "mesh data = -1, fsdp = 1, ring = 3 does not fit 8 devices"),
    ({"ring": 0}, "ring = 0"),
    ({"mapping": "vmap"}, "mesh.mapping = 'vmap': expected one of jit, pmap"),
    ({"mapping": "pmap", "fsdp": 2}, "mesh.fsdp = 2: pmap replicates the weights"),
  ],
)
def test_a_mesh_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    make_mesh(MeshConfig(**fields))


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


def test_an_example_on_several_devices():
  config = MeshConfig(data=-1, fsdp=2, tensor=1, sequence=2)
  mesh = make_mesh(config)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 2}
  ring = make_mesh(dataclasses.replace(config, data=1, ring=2))
  assert list(ring.shape.items()) == [("data", 1), ("fsdp", 2), ("ring", 2), ("sequence", 2)]
  batch = put_batch({"x": np.arange(8)}, mesh)
  assert sorted({shard.data.shape for shard in batch["x"].addressable_shards}) == [(2,)]
  check_batch(4, 1, mesh, "distill")
  line = r"distill.batch = 6 must be a multiple of 4 \(4 groups of devices x accumulate = 1\)"
  with pytest.raises(UserError, match=line):
    check_batch(6, 1, mesh, "distill")


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"tensor": 8}, "mesh.tensor = 8 does not divide 12 heads"),
    ({"sequence": 5}, "mesh.sequence = 5 does not divide 6 rows"),
    ({"tensor": 4, "sequence": 6}, "mesh.tensor x sequence = 24 does not divide the 12 heads"),
  ],
)
def test_what_is_split_divides(sizes, message):
  splits = {
    ("tensor",): (12, "12 heads"),
    ("sequence",): (6, "6 rows"),
    ("tensor", "sequence"): (12, "the 12 heads"),
  }
  with pytest.raises(UserError, match=message):
    MeshConfig(**sizes).check(splits)
  MeshConfig(tensor=2, sequence=6).check(splits)
