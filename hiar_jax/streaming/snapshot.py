"""Snapshots of a generation on disk: its arrays by Orbax, and metadata (JSON) that describes them.

A snapshot is a checkpoint of one step, with checksums; it is written under a temporary name and
renamed, and only then the one before it is removed.
"""

import dataclasses
import os
import pathlib
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.checkpoints import training_state
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import UserError
from hiar_jax.files import reading
from hiar_jax.rollout.packed_past import PackedPast
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.pipeline import PipelineState
from hiar_jax.types import PyTree

ADVICE = "resume another one, or start a new video"
# Snapshots keep the names of the first version, so that old ones can be resumed:
# option -> (name on disk, {value: value on disk})
ON_DISK = {"sink_positions": ("sink_place", {"absolute": "true", "relative": "carried"})}
# field of PipelineState -> name on disk, where they differ; its past is taken apart
ARRAYS_ON_DISK = {"recache": "anew"}


def write(
  directory: str | os.PathLike, arrays: PyTree, metadata: dict[str, Any], decoder: PyTree
) -> None:
  """Writes a snapshot and waits until it is on disk.

  arrays: a dict of arrays, the PipelineState or PackedPast as `pipe`. decoder: the state of whoever
  decodes (a tree of arrays, or None). Raises UserError where the disk is full.
  """
  leaves = {str(i): jnp.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(decoder))}
  # leaving the `with` waits for the save, which runs in the background
  with Checkpoints(directory, keep=1, config=_to_disk(metadata)) as checkpoints:
    step = (checkpoints.latest_step() or 0) + 1
    arrays = {**arrays, "pipe": _arrays_to_disk(arrays["pipe"])}
    # `params` is never an empty tree: without a decoder's state one number stands in for it
    params = {"decoder": leaves} if leaves else {"none": np.zeros(1)}
    checkpoints.save(step, arrays, params, force=True)


def read_metadata(directory: str | os.PathLike, identity: str) -> dict[str, Any]:
  """Returns the metadata of a snapshot.

  Raises UserError where no generation is saved, or one of another model than `identity`.
  """
  path = pathlib.Path(directory)
  if not os.path.isdir(path) or not any(entry.name.isdigit() for entry in path.iterdir()):
    raise UserError(f"{directory} holds no saved generation; check the path")
  found = training_state.load_config(directory)
  if not isinstance(found, dict) or not {"identity", "options", "prompts", "block"} <= found.keys():
    raise UserError(f"{directory} holds a checkpoint, but not of a generation; check the path")
  if found["identity"] != identity:
    raise UserError(
      f"{directory} was saved by another model ({found['identity']}; this one is {identity}): "
      "its weights, sizes, levels, history or text encoder differ; give the model that made it"
    )
  with reading(directory, ADVICE):
    options = dict(found["options"])
    for name, (on_disk, values) in ON_DISK.items():
      if on_disk in options:
        value_of = {stored: value for value, stored in values.items()}
        options[name] = value_of[options.pop(on_disk)]
  return {**found, "options": options}


def _to_disk(metadata: dict[str, Any]) -> dict[str, Any]:
  """Returns the metadata with its options under their names on disk."""
  options = dict(metadata["options"])
  for name, (on_disk, values) in ON_DISK.items():
    if name in options:
      options[on_disk] = values[options.pop(name)]
  return {**metadata, "options": options}


def read(
  directory: str | os.PathLike, metadata: dict[str, Any], abstract: PyTree
) -> tuple[PyTree, list[jax.Array] | None]:
  """Returns (the arrays of a snapshot, the leaves of the decoder's state in order, None where none
  was saved). abstract: shapes, dtypes and shardings of the arrays.

  The shardings may belong to another layout than the one it was saved on. Raises UserError for a
  damaged snapshot.
  """
  state = abstract["pipe"]
  # the metadata again: restoring compares it with what lies there
  with Checkpoints(directory, keep=1, config=_to_disk(metadata)) as checkpoints:
    arrays = checkpoints.restore({**abstract, "pipe": _arrays_to_disk(state)})[1]
  leaves = training_state.load_params(directory).get("decoder")
  decoder = None if leaves is None else [leaves[str(i)] for i in range(len(leaves))]
  return {**arrays, "pipe": _state_from_disk(state, arrays["pipe"])}, decoder


def _state_from_disk(state: PipelineState | PackedPast, pipe: dict[str, PyTree]):
  """Returns the state of the arrays that _arrays_to_disk made of one; state: its shapes."""
  if not isinstance(state, PipelineState):
    return serialization.from_state_dict(state, pipe)
  fields = {
    # a field that is None (`context` of a method whose contexts are free) is not on disk
    field.name: pipe.get(ARRAYS_ON_DISK.get(field.name, field.name))
    for field in dataclasses.fields(state)
    if field.name != "past"
  }
  cache = pipe["cache"]
  past = state.past.replace(
    kv=jax.tree.unflatten(jax.tree.structure(state.past.kv), jax.tree.leaves(cache["kv"])),
    positions=cache["position"],
    latents=pipe["shown"],
    **serialization.from_state_dict(_of_its_kind(state), pipe.get("past", {})),
  )
  return state.replace(past=past, **fields)


def _arrays_to_disk(state: PipelineState | PackedPast) -> dict[str, PyTree]:
  """Returns the fields of a state under their names on disk."""
  if not isinstance(state, PipelineState):
    return serialization.to_state_dict(state)
  fields = {
    ARRAYS_ON_DISK.get(field.name, field.name): getattr(state, field.name)
    for field in dataclasses.fields(state)
    if field.name != "past"
  }
  past = state.past
  cache = {"kv": past.kv, "position": past.positions}
  own = serialization.to_state_dict(_of_its_kind(state))
  return {**fields, "cache": cache, "shown": past.latents, **({"past": own} if own else {})}


def _of_its_kind(state: PipelineState) -> dict[str, PyTree]:
  """Returns the fields that the past has beside those of every ring."""
  of_rings = {field.name for field in dataclasses.fields(Ring)}
  fields = (field.name for field in dataclasses.fields(state.past))
  return {name: getattr(state.past, name) for name in fields if name not in of_rings}


def check_options(
  directory: str | os.PathLike, metadata: dict[str, Any], here: dict[str, Any]
) -> None:
  """Raises UserError where the snapshot's options differ from `here`, those of the engine that is
  to continue it.
  """
  differences = [
    f"{name} = {saved}, here {here.get(name)}"
    for name, saved in metadata["options"].items()
    if name not in here or here[name] != saved
  ]
  if differences:
    raise UserError(
      f"{directory} was saved with other options ({'; '.join(differences)}); use those that it was "
      "saved with"
    )
