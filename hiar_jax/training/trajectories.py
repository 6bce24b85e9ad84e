"""The student's noise levels, and the teacher's trajectories of which the points there are kept."""

import dataclasses

import numpy as np

from hiar_jax import flow
from hiar_jax.config.building import path_field
from hiar_jax.data.trajectories import TrajectoryWriter
from hiar_jax.errors import UserError, above, at_least, finite, one_of
from hiar_jax.rollout.solvers import SOLVERS


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  """The student's noise levels: nominal timesteps, shifted (flow.shifted_schedule)."""

  timesteps: tuple[float, ...] = (1000, 750, 500, 250)  # HiAR, section 4.1
  shift: float = 5.0  # HiAR's published configs

  def __post_init__(self):
    above(0, shift=self.shift)
    flow.shifted_schedule(self.timesteps, self.shift)  # raises where they do not fall to above 0

  @property
  def sigmas(self) -> np.ndarray:
    """The levels [s + 1] from 1 to 0, float64."""
    return flow.shifted_schedule(self.timesteps, self.shift)


@dataclasses.dataclass(frozen=True)
class TrajectoriesConfig:
  """The teacher's ODE trajectories, of which the points at the student's timesteps are kept."""

  count: int
  batch: int = 64  # sampled at once
  steps: int = 48  # HiAR's published script
  # Of the teacher's schedule; 0: the student's, so that the points lie at the student's own levels.
  shift: float = 0.0
  guidance: float = 3.0  # g of flow.classifier_free_guidance
  dtype: str = "float32"  # of the stored points
  # A folder written by generate_ode_pairs.py of HiAR or Self-Forcing, imported instead.
  pairs: str = path_field()
  solver: str = dataclasses.field(default="euler", metadata={"since": "2026-11"})

  def __post_init__(self):
    one_of(SOLVERS, solver=self.solver)
    one_of(TrajectoryWriter.dtypes, dtype=self.dtype)
    at_least(1, count=self.count, batch=self.batch, steps=self.steps)
    at_least(0, shift=self.shift)
    finite(guidance=self.guidance)

  def sigmas(self, student: StudentConfig) -> np.ndarray:
    """Returns the levels [s + 1] of the points: the student's timesteps under `shift`, float64."""
    return flow.shifted_schedule(student.timesteps, self.shift or student.shift)

  def kept(self, student: StudentConfig) -> tuple[int, ...]:
    """Returns the indices of the student's timesteps in the teacher's schedule.

    Raises UserError where the teacher's steps do not include them.
    """
    # Both are shifted alike, so they are compared before the shift: t falls from 1 to 0 in equal
    # steps there. 1e-6 forgives the rounding of 1 - t.
    nominal = np.asarray((*student.timesteps, 0.0)) / flow.TIMESTEPS
    index = (1 - nominal) * self.steps
    if np.abs(index - index.round()).max() > 1e-6:
      raise UserError(
        f"trajectories.steps = {self.steps}: the teacher's levels must include the student's "
        f"timesteps {student.timesteps}; use a multiple of 4 for (1000, 750, 500, 250)"
      )
    return tuple(int(i) for i in index.round())
