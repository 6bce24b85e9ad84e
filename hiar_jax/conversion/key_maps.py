"""Published tensor names <-> parameter trees, as a table of rules: one rule per published tensor.

A model's rules are data: `Rule(name, shape, path, kind, layer)`. The same table converts in both
directions, lists the names and shapes to be expected in a file, and says what is missing or left
over. Both directions have a form that holds one tensor at a time, for weights that are larger than
memory.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from hiar_jax.errors import UserError

LISTED = 4  # how many names an error message spells out


@dataclasses.dataclass(frozen=True)
class TensorMapping:
  """One published tensor and the place of its numbers in the parameter tree.

  kind says how the array is laid out here:
    same       as published
    linear     [out, in] -> [in, out]; trailing axes of size 1 (pointwise convolutions) are dropped
    conv       [out, in, *kernel] -> [*kernel, in, out]
    patches    [out, in, *kernel] -> [kernel * in, out]: a convolution whose stride is its kernel,
               as a linear layer
    vector     [c, 1, ...] -> [c]
  layer: row of a leaf that stacks the layers in front, [layers, ...]; None where the leaf is the
  tensor itself.
  """

  name: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  kind: str = "same"
  layer: int | None = None


def _inward(array: np.ndarray, kind: str) -> np.ndarray:
  if kind == "linear":
    return array.reshape(array.shape[:2]).T
  if kind == "conv":
    return np.moveaxis(array, (0, 1), (-1, -2))
  if kind == "patches":
    return _inward(array, "conv").reshape(-1, array.shape[0])
  return array.reshape(-1) if kind == "vector" else array


def _outward(array: np.ndarray, rule: TensorMapping) -> np.ndarray:
  if rule.kind == "patches":
    array = array.reshape(*rule.shape[2:], rule.shape[1], rule.shape[0])
  if rule.kind in ("conv", "patches"):
    array = np.moveaxis(array, (-1, -2), (0, 1))
  elif rule.kind == "linear":
    array = array.T
  return np.ascontiguousarray(array).reshape(rule.shape)


def shape_here(rule: TensorMapping) -> tuple[int, ...]:
  """Shape of the rule's tensor in the parameter tree, without the axis of stacked layers."""
  return _inward(np.broadcast_to(np.zeros((), np.int8), rule.shape), rule.kind).shape


def _some(names: Sequence[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:LISTED]) + (
    f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
  )


def check_names(names: Sequence[str], rules: Sequence[TensorMapping], what: str) -> None:
  """Raises UserError that lists what is missing and what is left over, compared with the rules of
  the model `what`.
  """
  given, expected = set(names), {rule.name for rule in rules}
  problems = []
  if expected - given:
    problems.append(f"{len(expected - given)} missing ({_some(expected - given)})")
  if given - expected:
    problems.append(f"{len(given - expected)} left over ({_some(given - expected)})")
  if problems:
    raise UserError(
      f"{what}: the tensors do not fit the config: {'; '.join(problems)}. Use these weights' "
      "config."
    )


def _checked(array: Any, rule: TensorMapping, what: str) -> np.ndarray:
  if tuple(array.shape) != rule.shape:
    raise UserError(
      f"{what}: {rule.name} has shape {tuple(array.shape)}, the config asks for {rule.shape}. Use "
      "the config of these weights."
    )
  return np.asarray(array)


def _place(tree: dict, path: tuple[str, ...], array: np.ndarray) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = array


class Stack:
  """Arrays of one shape and dtype as the rows of one that is not made before it is needed."""

  def __init__(self, rows: Sequence[np.ndarray]):
    self.rows = rows
    self.shape = (len(rows), *rows[0].shape)
    self.dtype = rows[0].dtype
    self.size = math.prod(self.shape)

  def __getitem__(self, row: int) -> np.ndarray:
    return self.rows[row]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # the rows lie apart: this always makes one
    return np.stack(self.rows).astype(dtype or self.dtype, copy=False)


def view_published(named: Mapping[str, Any], rules: Sequence[TensorMapping], what: str) -> dict:
  """Parameter tree of views of the given arrays and of Stacks of views, dtypes as given: no number
  is read.

  Raises UserError where a name is missing or left over, a shape differs, or layers differ in dtype.
  """
  check_names(list(named), rules, what)
  tree: dict = {}
  rows: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
  for rule in rules:
    array = _inward(_checked(named[rule.name], rule, what), rule.kind)
    if rule.layer is None:
      _place(tree, rule.path, array)
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
    _place(tree, path, Stack([stack[layer] for layer in sorted(stack)]))
  return tree


def from_published(named: Mapping[str, Any], rules: Sequence[TensorMapping], what: str) -> dict:
  """`view_published` with numpy arrays of their own. Raises UserError in the same cases."""
  return jax.tree.map(lambda leaf: np.array(leaf, order="C"), view_published(named, rules, what))


def iterate_published(
  params: Mapping[str, Any], rules: Sequence[TensorMapping], what: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Published names and layouts from a parameter tree, one tensor at a time; leaves may be anything
  that numpy.asarray reads.

  Raises UserError, before the first tensor, where the tree holds other leaves than the rules, or
  other shapes.
  """
  leaves = {
    tuple(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(params))[0]
  }
  depth = Counter(rule.path for rule in rules)
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
        f"asks for {shape}."
        " Use the config they were made with."
      )
  return _iterate(leaves, rules)


def _iterate(
  leaves: Mapping[tuple[str, ...], Any], rules: Sequence[TensorMapping]
) -> Iterator[tuple[str, np.ndarray]]:
  for rule in rules:
    leaf = leaves[rule.path] if rule.layer is None else leaves[rule.path][rule.layer]
    yield rule.name, _outward(np.asarray(leaf), rule)


def to_published(
  params: Mapping[str, Any], rules: Sequence[TensorMapping], what: str
) -> dict[str, np.ndarray]:
  """All of `iterate_published`; the exact inverse of `from_published`."""
  return dict(iterate_published(params, rules, what))
