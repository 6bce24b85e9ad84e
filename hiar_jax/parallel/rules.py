"""Which array lies where: the axes of a mesh that parameters and optimizer state are split over."""

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from hiar_jax.types import PyTree


def fsdp_spec(shape: tuple[int, ...], size: int, min_shard: int) -> jax.P:
  """The largest dimension that divides by `size` is split; small arrays are not."""
  if size == 1 or np.prod(shape, dtype=np.int64) < min_shard:
    return jax.P()
  for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
    if shape[axis] % size == 0:
      return jax.P(*(None,) * axis, "fsdp")
  return jax.P()


def state_shardings(tree: PyTree, mesh: Mesh, min_shard: int) -> PyTree:
  """A sharding for every leaf of a state (arrays or shapes)."""
  spec = lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"], min_shard))
  return jax.tree.map(spec, tree)
