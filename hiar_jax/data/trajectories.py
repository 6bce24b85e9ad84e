"""Teacher ODE trajectories: computed in resumable parts, then joined into one TFDS data set.

A trajectory holds the teacher's latents of one clip at the student's noise levels, noisiest first,
[s, f, h, w, c]; causal init regresses on it. A record is {trajectory, start int32 [], caption}
(data.parts).
"""

from collections.abc import Sequence
import os
from typing import Any

import numpy as np

from hiar_jax.data import tfds_builder
from hiar_jax.data.parts import PartWriter
from hiar_jax.errors import UserError


class TrajectoryWriter(PartWriter):
  """Collects `total` trajectories at `sigmas` (noisiest first) in parts of `part_size`.

  recipe: other settings that the trajectories depend on (guidance, seed, teacher step).
  """

  key = "trajectory"
  kind = "trajectories"
  dtypes = ("float32", "float16")
  not_finite = "the teacher has diverged, or its latents need float32"

  def __init__(
    self,
    directory: str | os.PathLike,
    sigmas: Sequence[float],
    total: int,
    part_size: int,
    dtype: str = "float32",
    recipe: dict[str, Any] | None = None,
  ):
    self.sigmas = [float(s) for s in sigmas]
    self.axes = (len(self.sigmas),)
    super().__init__(directory, total, part_size, dtype, {"sigmas": self.sigmas, **(recipe or {})})


def read_sigmas(directory: str | os.PathLike) -> list[float]:
  """Returns the noise levels of the trajectories in a directory, noisiest first.

  Raises:
    UserError: no trajectories there.
  """
  recipe = tfds_builder.read_recipe(directory) or {}
  if recipe.get("kind") != "trajectories":
    raise UserError(f"{directory} holds no trajectories; run the trajectories stage first")
  return recipe["sigmas"]


def check_sigmas(directory: str | os.PathLike, sigmas: Sequence[float]) -> None:
  """Ensures that the stored trajectories are at the noise levels that the student uses.

  Raises:
    UserError: other levels, or no trajectories there.
  """
  stored = read_sigmas(directory)
  wanted = np.asarray(sigmas, np.float64)
  # Levels may have passed through float32: 1e-6 covers its rounding.
  if len(stored) != len(sigmas) or not np.allclose(stored, wanted, rtol=0, atol=1e-6):
    listed = [", ".join(f"{sigma:.4f}" for sigma in levels) for levels in (stored, sigmas)]
    raise UserError(
      f"{directory} holds trajectories at sigmas {listed[0]}, but the student uses {listed[1]}; "
      "compute them again in another directory"
    )
