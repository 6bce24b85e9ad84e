"""The mesh of a run, and the devices over which its state is split where the config leaves it open.

With mesh.data = -1 and mesh.fsdp = -1, `fsdp` is the smallest number of devices over which the
state of each stage (weights, averages and moments, and networks that are read alone) takes at most
half of a device's memory; the other half is for activations. `data` takes the devices that are
left. So weights are gathered over few devices, on any number of them.

The states are counted from the experiment alone: training.updates defines stages of a run, which
has its mesh already and may have to read files that are made later (a test compares the two).
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models.frames import Network, abstract_weights
from hiar_jax.parallel.mesh import MeshConfig, all_devices, make_mesh
from hiar_jax.parallel.rules import Rules, tree_shardings
from hiar_jax.peak_memory import size
from hiar_jax.planning import device_memory
from hiar_jax.rollout.noise import seed_key
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.state import create_state
from hiar_jax.types import PyTree

SHARE = 0.5  # of a device's memory


def open_mesh(
  e: Experiment, devices: Sequence[jax.Device] | None = None, memory: int | None = None
) -> Mesh:
  """Returns the mesh of a run over all devices, or the given ones. memory: bytes of each; None: as
  they are counted here. Raises UserError as make_mesh.
  """
  devices = all_devices() if devices is None else list(devices)
  config = e.mesh
  if config.data == config.fsdp == -1:
    if memory is None:
      memory = device_memory.counted(jax.local_devices()[0]) or device_memory.of_host(devices)
    config = _chosen(e, len(devices), memory)
  return make_mesh(config, devices)


def _chosen(e: Experiment, count: int, memory: int) -> MeshConfig:
  """Returns the mesh config with sizes for `data` and `fsdp`."""
  within = math.prod(e.mesh.within.values())
  if count % within:
    given = " x ".join(f"{name} {n}" for name, n in e.mesh.within.items())
    raise UserError(f"mesh: {given} does not divide the {count} devices")
  groups = count // within
  states, alone = _states(e), 0
  for fsdp in (n for n in range(1, groups + 1) if groups % n == 0):
    config = dataclasses.replace(e.mesh, data=groups // fsdp, fsdp=fsdp)
    taken = max(_bytes(parts, config) for parts in states)
    alone = alone or taken
    if taken <= SHARE * memory:
      break
  if jax.process_count() > 1:  # hosts may count their memory differently
    fsdp = int(multihost_utils.broadcast_one_to_all(np.int32(fsdp)))
    config = dataclasses.replace(e.mesh, data=groups // fsdp, fsdp=fsdp)
  much = "at most" if taken <= SHARE * memory else "more than"
  logging.info(
    f"mesh: data = {config.data}, fsdp = {fsdp}: each device holds {size(taken)} of the state, "
    f"{much} half of its {size(memory)} (fsdp = 1: {size(alone)})"
  )
  return config


Parts = list[tuple[PyTree, Rules]]  # shapes, and the rules by which they are split


def _states(e: Experiment) -> list[Parts]:
  """Returns what lies on the devices, of each stage. Causal init holds a part of what distillation
  does.
  """
  teacher = [] if e.weights.base else [[_state(e.dit, e.teacher.optimizer(e.dit))]]
  return [*teacher, _packed(e) if e.framepack else _distillation(e)]


def _distillation(e: Experiment) -> Parts:
  config, adapters = e.distill, e.critic_adapters
  optimizers = config.generator_optimizer(e.student_dit), config.critic_optimizer(adapters or e.dit)
  critic = abstract_weights(e.dit)
  if adapters:
    critic = jax.eval_shape(adapters.start, jax.random.key(0), critic)
  params = abstract_weights(e.stored_student)
  rules = (adapters or e.stored_student).sharding_rules
  frozen = [e.teacher_dit] + ([e.dit] if adapters and not e.one_score else [])
  return [
    (_created(params, optimizers[0], critic, optimizers[1]), rules),
    *((abstract_weights(network, network.dtype), network.sharding_rules) for network in frozen),
  ]


def _packed(e: Experiment) -> Parts:
  network, adapters = e.packed_dit, e.packed_adapters
  optimizer = e.framepack.optimizer(adapters or network)
  if not adapters:
    return [_state(network, optimizer)]
  base = abstract_weights(network)
  trained = jax.eval_shape(adapters.start, jax.random.key(0), base)
  return [
    (_created(trained, optimizer), adapters.sharding_rules),
    (adapters.frozen(base), network.sharding_rules),
  ]


def _state(network: Network, optimizer: Any) -> tuple[PyTree, Rules]:
  return _created(abstract_weights(network), optimizer), network.sharding_rules


def _created(params: PyTree, optimizer, critic: PyTree = None, critic_optimizer=None) -> PyTree:
  """Returns the shapes of a first state."""

  def create(params, critic):
    return create_state(seed_key(0), params, optimizer, critic, critic_optimizer)

  return jax.eval_shape(create, params, critic)


def _bytes(parts: Parts, config: MeshConfig) -> int:
  """Returns the bytes of these arrays on one device of a mesh."""
  axes = {"data": config.data, "fsdp": config.fsdp, **config.within}
  mesh, total = AbstractMesh(tuple(axes.values()), tuple(axes)), 0
  for shapes, rules in parts:
    shardings = tree_shardings(shapes, mesh, rules, min_shard=config.min_shard)
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
      total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return total
