"""The device mesh and the placement of batches on it.

By default a step is one `jit` over a mesh: batches are split over `data` and `fsdp`, weights and
optimizer state over `fsdp` (parallel.rules), and XLA inserts the communication. `tensor`,
`sequence` and `ring` split one example over several devices, so that there may be more devices than
examples. `mapping="pmap"` replicates weights and state and averages gradients with `pmean`. All
give the update that one device gives.
"""

from collections.abc import Mapping
import dataclasses
import math
import os

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import UserError, at_least
from hiar_jax.parallel.rules import leaf_sharding
from hiar_jax.types import Batch

MAPPINGS = ("jit", "pmap")

# Mesh axes -> (a number that the product of their sizes must divide, its name in messages). An axis
# that is in no entry is not split, so its size is 1.
Splits = Mapping[tuple[str, ...], tuple[int, str]]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis and the mapping of steps, `jit` or `pmap`.

  data, fsdp: one of them may be -1, all devices that are left; both: as the state of a run needs it
  (training.device_mesh). tensor: splits heads and hidden units; sequence: the tokens of a frame
  between attentions, heads inside; ring: the tokens of a frame, inside too (attention.ring).
  min_shard: arrays with fewer elements are replicated, since gathering them costs more time than
  splitting them saves memory.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = dataclasses.field(default=1, metadata={"since": "2026-11"})
  sequence: int = dataclasses.field(default=1, metadata={"since": "2026-11"})
  ring: int = dataclasses.field(default=1, metadata={"since": "2026-11"})
  mapping: str = "jit"
  min_shard: int = 2**20  # 4 MiB of float32, as in big_vision and openpi

  def __post_init__(self):
    if self.mapping not in MAPPINGS:
      raise UserError(f"mesh.mapping = {self.mapping!r}: expected one of {', '.join(MAPPINGS)}")
    if self.mapping == "pmap" and self.fsdp != 1:
      raise UserError(
        f"mesh.fsdp = {self.fsdp}: pmap replicates the weights; use fsdp = 1 or mapping = 'jit'"
      )
    at_least(0, min_shard=self.min_shard)
    at_least(1, tensor=self.tensor, sequence=self.sequence, ring=self.ring)
    if self.mapping == "pmap" and self.within:
      given = ", ".join(f"{name} = {size}" for name, size in self.within.items())
      raise UserError(
        f"mesh.{given}: pmap gives each device whole examples; use 1, or mapping = 'jit'"
      )

  @property
  def within(self) -> dict[str, int]:
    """The axes that split one example, those that are there.

    `ring` varies slowest: its exchange can hide behind arithmetic, those of the others cannot.
    """
    sizes = {name: getattr(self, name) for name in ("ring", "tensor", "sequence")}
    return {name: size for name, size in sizes.items() if size > 1}

  def check(self, splits: Splits) -> None:
    """Raises UserError where an axis does not divide what it splits (Network.splits)."""
    for axes, (whole, what) in splits.items():
      size = math.prod(getattr(self, axis) for axis in axes)
      if whole % size:
        raise UserError(f"mesh.{' x '.join(axes)} = {size} does not divide {what}")


def all_devices() -> list[jax.Device]:
  """Returns the devices of all processes. Raises UserError where JAX finds none of the platform
  that it is told to use.
  """
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:  # the first without a word
    platforms = os.environ.get("JAX_PLATFORMS", "")
    said = " ".join(str(error).split()) or f"there is none for JAX_PLATFORMS={platforms}"
    raise UserError(
      f"JAX finds no device ({said}); install JAX for it (launch/setup.sh cuda), check the driver "
      "(nvidia-smi), or leave JAX_PLATFORMS out (launch/local.sh) for what is there"
    ) from error


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Returns a (data, fsdp) mesh over all devices, or the given ones; with axes ring, tensor and
  sequence behind these where they are larger than 1.

  Raises UserError where the sizes do not multiply to the number of devices.
  """
  devices = all_devices() if devices is None else devices
  count = len(devices)
  sizes = [config.data, config.fsdp]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(
      f"mesh data = {config.data}, fsdp = {config.fsdp}: expected sizes of at least 1, at most "
      "one of them -1"
    )
  within = config.within
  known = math.prod([size for size in sizes if size != -1]) * math.prod(within.values())
  sizes = [count // known if size == -1 else size for size in sizes] + list(within.values())
  if math.prod(sizes) != count:
    given = "".join(f", {name} = {size}" for name, size in within.items())
    raise UserError(
      f"mesh data = {config.data}, fsdp = {config.fsdp}{given} does not fit {count} devices; their "
      f"product must be {count} (--config.mesh.data=1 --config.mesh.fsdp=-1 takes all of them)"
    )
  names = ("data", "fsdp", *within)
  # 8 x 8 of a TPU slice 4x4x4: jax.make_mesh asks for products of whole sides of the slice
  grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
  # Auto: Flax's Linen layers cannot say how their outputs are sharded, as Explicit axes ask
  return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, jax.P())


def everywhere(x, mesh: Mesh):
  """Returns an array that this process can read whole; all processes call this together where it
  lies on the devices of several.
  """
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return x
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(x)


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
  devices = mesh.shape["data"] * mesh.shape["fsdp"]
  parts = devices * accumulate
  if batch % parts:
    of = "devices" if devices == mesh.size else "groups of devices"
    raise UserError(
      f"{name}.batch = {batch} must be a multiple of {parts} ({devices} {of} x accumulate = "
      f"{accumulate}); the nearest is {max(parts, round(batch / parts) * parts)}"
    )
