"""How a training step is mapped over devices: by jit over a mesh, or by pmap."""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh

from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import replicated
from hiar_jax.types import PyTree

NO_MESH = jax.sharding.AbstractMesh((), ())


def map_step(step: Callable, shardings: PyTree, mesh: Mesh, mapping: str = "jit") -> Callable:
  """step(state, batch, *frozen, mean) -> (state, metrics), spread over the mesh; the old state's
  memory is reused.
  """
  if mapping == "pmap":
    if jax.process_count() > 1:
      raise UserError(
        "mesh.mapping = 'pmap' runs in one process; use mapping = 'jit' on several hosts"
      )
    return _pmap(step, mesh)
  mapped = jax.jit(
    functools.partial(step, mean=lambda tree: tree),
    donate_argnums=0,
    out_shardings=(shardings, replicated(mesh)),
  )
  return mapped


def _pmap(step: Callable, mesh: Mesh) -> Callable:
  mean = functools.partial(jax.lax.pmean, axis_name="devices")
  devices = list(mesh.devices.flat)

  @functools.cache
  def mapped(frozen: int):
    return jax.pmap(
      functools.partial(step, mean=mean),
      axis_name="devices",
      devices=devices,
      in_axes=(None, 0) + (None,) * frozen,
      out_axes=None,
    )

  def call(state, batch, *frozen):
    rows = jax.tree.map(
      lambda x: x.reshape(len(devices), x.shape[0] // len(devices), *x.shape[1:]), batch
    )
    # pmap has a mesh of its own and refuses the one around it
    with jax.sharding.use_abstract_mesh(NO_MESH):
      return mapped(len(frozen))(state, rows, *frozen)

  return call
