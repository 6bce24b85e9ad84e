"""Parameter trees from published tensors in memory, and the way back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax.conversion.key_maps import TensorMapping, iterate_published, view_published


def from_published(named: Mapping[str, Any], rules: Sequence[TensorMapping], what: str) -> dict:
  """`view_published` as contiguous copies."""
  return jax.tree.map(lambda leaf: np.array(leaf, order="C"), view_published(named, rules, what))


def to_published(
  params: Mapping[str, Any], rules: Sequence[TensorMapping], what: str
) -> dict[str, np.ndarray]:
  """All of `iterate_published`; the exact inverse of `from_published`."""
  return dict(iterate_published(params, rules, what))
