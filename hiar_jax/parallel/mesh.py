"""The device mesh and the placement of batches on it.

By default a step is one `jit` over a mesh: batches are split over `data` and `fsdp`, weights and
optimizer state over `fsdp` (parallel.rules), and XLA inserts the communication. `mapping="pmap"`
replicates weights and state and averages gradients with `pmean`. Both give the update that one
device gives.
"""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.parallel.rules import leaf_sharding
from hiar_jax.types import Batch

MAPPINGS = ("jit", "pmap")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis (-1: all that are left) and the mapping of steps, `jit` or `pmap`.

  min_shard: arrays with fewer elements are replicated, since gathering them costs more time than
  splitting them saves memory.
  """

  data: int = -1
  fsdp: int = 1
  mapping: str = "jit"
  min_shard: int = 2**20  # 4 MiB of float32, as in big_vision and openpi

  def __post_init__(self):
    if self.mapping not in MAPPINGS:
      raise UserError(f"mesh.mapping = {self.mapping!r}: expected one of {', '.join(MAPPINGS)}")
    if self.mapping == "pmap" and self.fsdp != 1:
      raise UserError(
        f"mesh.fsdp = {self.fsdp}: pmap replicates the weights; use fsdp = 1 or mapping = 'jit'"
      )


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Returns a (data, fsdp) mesh over all devices, or the given ones.

  Raises UserError where the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = [config.data, config.fsdp]
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
  # Auto: Flax's Linen layers cannot say how their outputs are sharded, as Explicit axes ask
  return jax.make_mesh(
    tuple(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, jax.P())


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
  """Makes global arrays [b ...], split over all devices, from this process's rows of a batch."""
  sharding = leaf_sharding("batch/rows", mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )


def check_batch(batch: int, accumulate: int, mesh: Mesh, name: str) -> None:
  """Raises UserError where a batch cannot be split evenly over devices and parts.

  batch: global examples; name: the config group, for the message.
  """
  parts = mesh.size * accumulate
  if batch % parts:
    raise UserError(
      f"{name}.batch = {batch} must be a multiple of {parts} ({mesh.size} devices x accumulate = "
      f"{accumulate}); the nearest is {max(parts, round(batch / parts) * parts)}"
    )
