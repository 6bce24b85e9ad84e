"""Published weights <-> parameter trees."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.dit_names import dit_rules
from hiar_jax.models.published_names import from_published, to_published
from hiar_jax.types import Params

_DIT = "DiT (Wan2.1's names)"


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor of the published checkpoint of a DiT of this size: name -> shape."""
  return {rule.name: rule.shape for rule in dit_rules(config)}


def params_from_torch(named_arrays: Mapping[str, Any], config: DiTConfig) -> Params:
  """Arrays under Wan2.1's published names -> parameters of `DiT(config)`, dtypes as given.

  Raises UserError listing what is missing or left over, or naming the tensor whose shape differs.
  """
  return from_published(named_arrays, dit_rules(config), _DIT)


def params_to_torch(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
  """The exact inverse of `params_from_torch`."""
  return to_published(params, dit_rules(config), _DIT)
