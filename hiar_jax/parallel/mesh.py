"""Devices: the mesh, which array lies where, and how a step is mapped over devices.

By default a step is one `jit` over a mesh: batches are split over `data` and `fsdp`, weights and
optimizer state over `fsdp`, and XLA inserts the communication. `mapping="pmap"` replicates
everything and averages gradients with `pmean`. Both give the update that one device gives.
"""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.types import Batch

MAPPINGS = ("jit", "pmap")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis, -1 = all that are left; mapping: how training steps are spread.

  min_shard: arrays with fewer elements are replicated, since gathering them costs more than they
  save.
  """

  data: int = -1
  fsdp: int = 1
  mapping: str = "jit"
  min_shard: int = 2**20

  def __post_init__(self):
    if self.mapping not in MAPPINGS:
      raise UserError(f"mesh.mapping = {self.mapping!r}: expected one of {', '.join(MAPPINGS)}")
    if self.mapping == "pmap" and self.fsdp != 1:
      raise UserError(
        f"mesh.fsdp = {self.fsdp}: pmap replicates the weights; use fsdp = 1 or mapping = 'jit'"
      )


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A (data, fsdp) mesh over all devices (or the given ones)."""
  devices = jax.devices() if devices is None else devices
  sizes, count = [config.data, config.fsdp], len(devices)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(
      f"mesh data = {config.data}, fsdp = {config.fsdp}: expected sizes of at least 1, at most "
      "one of them -1"
    )
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [count // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != count:
    raise UserError(
      f"mesh data = {config.data}, fsdp = {config.fsdp} does not fit {count} devices; their "
      f"product must be {count}"
    )
  return jax.make_mesh(tuple(sizes), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, jax.P())


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
  """This process's rows of a batch -> global arrays, rows split over all devices."""
  sharding = NamedSharding(mesh, jax.P(BATCH_AXES))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )


def check_batch(batch: int, accumulate: int, mesh: Mesh, name: str) -> None:
  """Raises UserError where a batch cannot be split evenly."""
  parts = mesh.size * accumulate
  if batch % parts:
    raise UserError(
      f"{name}.batch = {batch} must be a multiple of {parts} ({mesh.size} devices x accumulate = "
      f"{accumulate}); "
      f"the nearest is {max(parts, round(batch / parts) * parts)}"
    )
