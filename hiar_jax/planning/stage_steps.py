"""The updates of training.updates, with shapes for all that they take."""

from collections.abc import Callable
import dataclasses

import jax

from hiar_jax.models.frames import abstract_weights
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.training import updates
from hiar_jax.training.pretrained import frozen_of
from hiar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class StageStep:
  """One kind of update. starts: what the stage's `create` takes. batch, frozen: what the step takes
  beside its state.
  """

  stage: updates.Stage
  update: updates.Update
  starts: tuple[PyTree, ...]
  batch: PyTree
  frozen: PyTree

  @property
  def state(self) -> PyTree:
    return jax.eval_shape(self.stage.create, *self.starts)


# name of a program -> the stage that has its update
STAGES: dict[str, Callable[[AbstractRun], updates.Stage]] = {
  "teacher": updates.of_teacher,
  "causal_init": updates.of_causal_init,
  "critic": updates.of_distillation,
  "generator": updates.of_distillation,
  "framepack": updates.of_framepack,
}


def step_of(run: AbstractRun, name: str) -> StageStep:
  """Returns the update of a program."""
  e, stage = run.experiment, STAGES[name](run)
  update = next(update for update in stage.updates if update.name in ("", name))
  batch, *others = (run.batch(stage.config.batch, *stage.feeds[f].keys) for f in update.feeds)
  frozen = None
  if update.frozen:
    weights = (abstract_weights(*frozen_of(e, read)) for read in update.reads)
    frozen = jax.eval_shape(update.frozen, run.negative, *weights)
  return StageStep(
    stage,
    update,
    starts=tuple(abstract_weights(e.network_of(start)) for start in stage.starts),
    batch=batch | dict(zip(update.feeds[1:], others, strict=True)),
    frozen=frozen,
  )
