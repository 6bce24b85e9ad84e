"""Shardings of parameters and optimizer state: the mesh axes that each array is split over."""

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from hiar_jax.types import PyTree


def fsdp_spec(shape: tuple[int, ...], size: int, min_shard: int) -> jax.P:
  """Returns the spec that splits the largest dimension divisible by `size` over `fsdp`.

  Arrays of fewer than `min_shard` elements, or without such a dimension, are replicated.
  """
  if size == 1 or np.prod(shape, dtype=np.int64) < min_shard:
    return jax.P()
  # sorted is stable: of equal dimensions the first is split
  for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
    if shape[axis] % size == 0:
      return jax.P(*(None,) * axis, "fsdp")
  return jax.P()


def state_shardings(tree: PyTree, mesh: Mesh, min_shard: int) -> PyTree:
  """Returns a sharding for every leaf of a state (arrays or their shapes).

  The optimizer's moments have the shapes of their parameters, so they are split as those are.
  """
  return jax.tree.map(
    lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"], min_shard)), tree
  )


def sharded_shapes(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns the abstract arrays that a checkpoint is restored into, each with its sharding."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )
