"""The mapping of a training step over devices: jit over a mesh, or pmap."""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh

from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import replicated
from hiar_jax.types import PyTree

NO_MESH = jax.sharding.AbstractMesh((), ())


def map_step(make_step: Callable, shardings: PyTree, mesh: Mesh, mapping: str = "jit") -> Callable:
  """Returns step(state, batch, frozen) -> (state, metrics), compiled for all devices of the mesh.

  make_step(mean=...) makes the step of one device; mean averages over devices. frozen: arrays that
  nobody trains, on every device. Under jit the old state's buffers are donated. Raises UserError
  for pmap on several processes.
  """
  if mapping == "pmap":
    if jax.process_count() > 1:
      raise UserError(
        "mesh.mapping = 'pmap' runs in one process; use mapping = 'jit' on several hosts"
      )
    return _pmap(make_step, mesh)
  return jax.jit(
    # A mean over the sharded batch axis is the global one already: XLA inserts the all-reduce.
    make_step(mean=lambda tree: tree),
    donate_argnums=0,
    out_shardings=(shardings, replicated(mesh)),
  )


def _pmap(make_step: Callable, mesh: Mesh) -> Callable:
  devices = list(mesh.devices.flat)
  mapped = jax.pmap(
    make_step(mean=functools.partial(jax.lax.pmean, axis_name="devices")),
    axis_name="devices",
    devices=devices,
    # state and frozen trees are replicated, the batch is split, the result is the same everywhere
    in_axes=(None, 0, None),
    out_axes=None,
  )

  def split(x):
    # [b ...] -> [devices, b / devices, ...], in the order in which the mesh splits a batch
    return x.reshape(len(devices), x.shape[0] // len(devices), *x.shape[1:])

  def step(state, batch, frozen):
    # pmap has a mesh of its own and refuses the one set by jax.set_mesh
    with jax.sharding.use_abstract_mesh(NO_MESH):
      return mapped(state, jax.tree.map(split, batch), frozen)

  return step
