"""Key maps between published tensors and parameter trees: one rule per published tensor.

A model's rules are data: `TensorMapping(name, shape, path, kind, layer)`. The same table converts
in both directions, lists the names and shapes that a file must have, and finds missing and left
over ones. Both directions have a form that holds one tensor at a time, for weights larger than
memory.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from hiar_jax.errors import UserError

LISTED = 4  # names that an error message spells out


@dataclasses.dataclass(frozen=True)
class TensorMapping:
  """One published tensor and its place in the parameter tree.

  kind: layout of the array, published -> here:
    same       as published
    linear     [out, in] -> [in, out]; trailing axes of size 1 (pointwise convolutions) are dropped
    conv       [out, in, *kernel] -> [*kernel, in, out]
    patches    [out, in, *kernel] -> [kernel * in, out]: a convolution whose stride is its kernel,
               as a linear layer
    vector     [c, 1, ...] -> [c]
  layer: row of a leaf [layers, ...] that stacks all layers; None if the leaf is the tensor itself.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  kind: str = "same"
  layer: int | None = None


def _inward(array: np.ndarray, kind: str) -> np.ndarray:
  """Returns a published array in the layout of the tree: a view, except for "patches"."""
  if kind == "linear":
    return array.reshape(array.shape[:2]).T
  if kind == "conv":
    return np.moveaxis(array, (0, 1), (-1, -2))
  if kind == "patches":
    # [*kernel, in, out] -> [kernel * in, out]: the order in which DiT flattens a patch.
    return _inward(array, "conv").reshape(-1, array.shape[0])
  return array.reshape(-1) if kind == "vector" else array


def _outward(array: np.ndarray, rule: TensorMapping) -> np.ndarray:
  """Inverts `_inward`; contiguous, as safetensors needs."""
  if rule.kind == "patches":
    array = array.reshape(*rule.shape[2:], rule.shape[1], rule.shape[0])
  if rule.kind in ("conv", "patches"):
    array = np.moveaxis(array, (-1, -2), (0, 1))
  elif rule.kind == "linear":
    array = array.T
  return np.ascontiguousarray(array).reshape(rule.shape)


def shape_here(rule: TensorMapping) -> tuple[int, ...]:
  """Returns the shape of a rule's tensor in the tree, without the axis of stacked layers."""
  # A broadcast scalar has the shape, but needs no memory.
  return _inward(np.broadcast_to(np.zeros((), np.int8), rule.shape), rule.kind).shape


def _some(names: Iterable[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:LISTED]) + (
    f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
  )


class Stack:
  """Arrays of one shape and dtype as the rows of a larger one, stacked when it is read."""

  def __init__(self, rows: Sequence[np.ndarray]):
    self.rows = rows
    self.shape = (len(rows), *rows[0].shape)
    self.dtype = rows[0].dtype
    self.size = math.prod(self.shape)

  def __getitem__(self, row: int) -> np.ndarray:
    return self.rows[row]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # the rows lie apart, so stacking always copies
    return np.stack(self.rows).astype(dtype or self.dtype, copy=False)


def view_published(named: Mapping[str, Any], rules: Sequence[TensorMapping], what: str) -> dict:
  """Returns a parameter tree of views and of Stacks of views, dtypes as given.

  Raises UserError if a name is missing or left over, a shape differs, or layers differ in dtype.
  """
  given, expected = set(named), {rule.name for rule in rules}
  unfit = (("missing", expected - given), ("left over", given - expected))
  problems = [f"{len(names)} {problem} ({_some(names)})" for problem, names in unfit if names]
  if problems:
    raise UserError(
      f"{what}: the tensors are not those of a model that is known here: {'; '.join(problems)}. "
      "Give the complete weights of one model, and no other config.json beside them."
    )
  arrays: dict[tuple[str, ...], Any] = {}  # by path
  # Layers are collected by row first: rules may come in any order.
  rows: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for rule in rules:
    published = named[rule.name]
    if tuple(published.shape) != rule.shape:
      raise UserError(
        f"{what}: {rule.name} has shape {tuple(published.shape)}, the config asks for "
        f"{rule.shape}. Give the complete weights of one model, with its own config.json."
      )
    array = _inward(np.asarray(published), rule.kind)
    if rule.layer is None:
      arrays[rule.path] = array
      continue
    stack = rows.setdefault(rule.path, {})
    first = next(iter(stack.values()), array)
    if first.dtype != array.dtype:
      raise UserError(
        f"{what}: {rule.name} is {array.dtype}, other layers are {first.dtype}; expected one "
        "dtype. Save the weights in one dtype."
      )
    stack[rule.layer] = array
  for path, stack in rows.items():
    arrays[path] = Stack([stack[layer] for layer in sorted(stack)])
  return flax.traverse_util.unflatten_dict(arrays)


@jax.jit
def _at(stacked: jax.Array, layer: int) -> jax.Array:
  """Compiled for each shape, where stacked[layer] is for each layer too."""
  return stacked[layer]


def iterate_published(
  params: Mapping[str, Any], rules: Sequence[TensorMapping], what: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Iterates over (published name, array in the published layout) of a parameter tree.

  Holds one tensor at a time; leaves may be anything that numpy.asarray reads. Raises UserError, at
  the call, if the tree has other leaves than the rules, or other shapes.
  """
  leaves = {
    tuple(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(params))[0]
  }
  depth = Counter(rule.path for rule in rules)  # number of layers, for stacked leaves
  if set(leaves) != set(depth):
    odd = [".".join(path) for path in set(leaves) ^ set(depth)]
    raise UserError(
      f"{what}: parameters and config differ at {_some(odd)}. Use the config they were made with."
    )
  for rule in rules:
    shape = shape_here(rule) if rule.layer is None else (depth[rule.path], *shape_here(rule))
    if tuple(leaves[rule.path].shape) != shape:
      raise UserError(
        f"{what}: {'.'.join(rule.path)} has shape {tuple(leaves[rule.path].shape)}, the config "
        f"asks for {shape}. Use the config they were made with."
      )

  # A generator of its own, so that the checks above run at the call and not at the first tensor.
  def generate() -> Iterator[tuple[str, np.ndarray]]:
    for rule in rules:
      leaf = leaves[rule.path]
      if rule.layer is not None:
        leaf = _at(leaf, rule.layer) if isinstance(leaf, jax.Array) else leaf[rule.layer]
      yield rule.name, _outward(np.asarray(leaf), rule)

  return generate()
