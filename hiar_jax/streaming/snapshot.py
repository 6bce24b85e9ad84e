"""A generation on disk: its arrays by Orbax, and beside them the facts that say what they are.

Checkpoints of one step each: written under another name and renamed, with checksums, the one before
removed only then.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.checkpoints import training_state
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import UserError
from hiar_jax.rollout.tick import PipelineMethod, PipelineState
from hiar_jax.types import PyTree

# On disk an option keeps the names that it had first: {name: (name on disk, {value: on disk})}.
ON_DISK = {"sink_positions": ("sink_place", {"absolute": "true", "relative": "carried"})}
# So do the arrays of a PipelineState.
ARRAYS_ON_DISK = {"contexts": "shown", "recache": "anew"}


def write(
  directory: str | os.PathLike, arrays: PyTree, facts: dict[str, Any], decoder: PyTree
) -> None:
  """Returns when it is on disk."""
  leaves = {str(i): jnp.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(decoder))}
  with Checkpoints(directory, keep=1, config=_to_disk(facts)) as checkpoints:
    step = (checkpoints.latest_step() or 0) + 1
    arrays = {**arrays, "pipe": _arrays_to_disk(arrays["pipe"])}
    checkpoints.save(
      step, arrays, {"decoder": leaves} if leaves else {"none": np.zeros(1)}, force=True
    )


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
  """Raises UserError where no generation is saved."""
  path = pathlib.Path(directory)
  if not path.is_dir() or not any(entry.name.isdigit() for entry in path.iterdir()):
    raise UserError(f"{directory} holds no saved generation; check the path")
  found = training_state.load_config(directory)
  if not {"identity", "options", "prompts", "block"} <= found.keys():
    raise UserError(f"{directory} holds a checkpoint, but not of a generation; check the path")
  return {**found, "options": _from_disk(found["options"])}


def _to_disk(facts: dict[str, Any]) -> dict[str, Any]:
  options = dict(facts["options"])
  for name, (on_disk, values) in ON_DISK.items():
    options[on_disk] = values[options.pop(name)]
  return {**facts, "options": options}


def _from_disk(options: dict[str, Any]) -> dict[str, Any]:
  options = dict(options)
  for name, (on_disk, values) in ON_DISK.items():
    here = {there: value for value, there in values.items()}
    options[name] = here[options.pop(on_disk)]
  return options


def read(directory: str | os.PathLike, facts: dict[str, Any], abstract: PyTree) -> PyTree:
  with Checkpoints(directory, keep=1, config=_to_disk(facts)) as checkpoints:
    arrays = checkpoints.restore({**abstract, "pipe": _arrays_to_disk(abstract["pipe"])})[1]
  state = abstract["pipe"]
  names = {
    field.name: ARRAYS_ON_DISK.get(field.name, field.name) for field in dataclasses.fields(state)
  }
  pipe = state.replace(**{name: arrays["pipe"].get(there) for name, there in names.items()})
  return {**arrays, "pipe": pipe}


def _arrays_to_disk(state: PipelineState) -> dict[str, PyTree]:
  return {
    ARRAYS_ON_DISK.get(field.name, field.name): getattr(state, field.name)
    for field in dataclasses.fields(state)
  }


def decoder(directory: str | os.PathLike) -> list[jax.Array] | None:
  """The leaves of the decoder's state, in order; None where there was none."""
  leaves = training_state.load_params(directory).get("decoder")
  return None if leaves is None else [leaves[str(i)] for i in range(len(leaves))]


def check_identity(directory: str | os.PathLike, facts: dict[str, Any], identity: str) -> None:
  if facts["identity"] != identity:
    raise UserError(
      f"{directory} was saved by another model ({facts['identity']}; this one is {identity}): its "
      "weights, sizes, levels, history or text "
      "encoder differ; give the model that made it"
    )


def check_options(
  directory: str | os.PathLike, facts: dict[str, Any], here: dict[str, Any]
) -> None:
  """here: `options` of the engine that is to go on."""
  lines = [
    f"{name} = {there}, here {here[name]}"
    for name, there in facts["options"].items()
    if here[name] != there
  ]
  if lines:
    raise UserError(
      f"{directory} was saved with other options ({'; '.join(lines)}); use those that it was "
      "saved with"
    )


def options(plan: PipelineMethod) -> dict[str, Any]:
  """Those that change a number; the layout does not."""
  return {
    "window": plan.method.window,
    "sink": plan.method.sink,
    "sink_positions": plan.sink_positions,
  }


def shape(array: jax.Array) -> dict[str, Any]:
  return {"shape": list(array.shape), "dtype": str(array.dtype)}


def abstract(shape: dict[str, Any], sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(shape["shape"]), shape["dtype"], sharding=sharding)
