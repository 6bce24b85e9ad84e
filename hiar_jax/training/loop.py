"""The training loop of every stage: update, log the update before, save, stop when asked."""

from collections.abc import Callable, Mapping
import sys

from etils import epath
import jax
import numpy as np

from hiar_jax.checkpoints import checksums
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import put_batch
from hiar_jax.parallel.rules import state_shardings
from hiar_jax.preemption import Preemption
from hiar_jax.progress import Progress, is_writer, progress
from hiar_jax.training.run import Run
from hiar_jax.training.state import TrainConfig, TrainState
from hiar_jax.types import Batch, PyTree


class Preempted(SystemExit):
  """The stage saved its state after a signal; the same command goes on from there."""


class DataIterators:
  """Several batch iterators that are saved and restored as one."""

  def __init__(self, run: Run, **iterators):
    self._run, self._iterators = run, iterators

  def next(self, name: str) -> Batch:
    """The next batch as global arrays, with each example's index in the global batch."""
    batch = dict(next(self._iterators[name]))
    local = len(batch["tokens"])
    batch["example_id"] = np.arange(local, dtype=np.int32) + local * jax.process_index()
    return put_batch(batch, self._run.mesh)

  def get_state(self) -> dict:
    return {name: iterator.get_state() for name, iterator in self._iterators.items()}

  def set_state(self, state: dict) -> None:
    for name, iterator in self._iterators.items():
      iterator.set_state(state[name])


def is_done(run: Run, stage: str, steps: int) -> bool:
  """True where the stage's last checkpoint is there, undamaged.

  Raises UserError where the stage should come from `stages_from` and has no such checkpoint there.
  """
  last = epath.Path(run.directory(stage)) / "checkpoints" / str(steps)
  try:
    if last.is_dir():
      checksums.check(last)
      return True
  except checksums.Damaged:
    pass  # training restores the one before, says so, and comes here again
  if run.borrows(stage):
    raise UserError(
      f"stages_from = {run.experiment.stages_from!r}: its {stage} is not there, not finished or "
      f"damaged ({last}); "
      "run the command that made it once more"
    )
  return False


def run_stage(
  run: Run,
  stage: str,
  training: TrainConfig,
  *,
  create: Callable[[], TrainState],
  update: Callable[
    [PyTree], Callable[[TrainState, DataIterators, int], tuple[TrainState, Mapping]]
  ],
  iterators: DataIterators,
  preview: Callable[[TrainState], np.ndarray] | None = None,
) -> None:
  """Runs a stage to `training.steps`, from its newest checkpoint or from `create()`.

  update(shardings) -> (state, feeds, step) -> (state, metrics). preview: state -> clips uint8 [b f
  H W 3] for the log. Raises Stopped after SIGTERM or SIGINT, with the state saved.
  """
  log, shapes = run.experiment.log, jax.eval_shape(create)
  shardings = state_shardings(shapes, run.mesh, run.experiment.mesh.min_shard)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  config = {"model": to_json(run.experiment.dit), "stage": stage}
  with Checkpoints(
    run.directory(stage) / "checkpoints", keep=log.keep, config=config
  ) as checkpoints:
    restored = checkpoints.restore(abstract, iterators)
    step, state = restored or (0, jax.jit(create, out_shardings=shardings)())
    run.writer.resume(stage, step)
    if not step and is_writer():
      print_parameters(stage, shapes.params)
    advance = update(shardings)
    pending = None
    with Preemption() as stop, progress(stage, training.steps, initial=step) as bar:
      stopping = False
      while step < training.steps and not stopping:
        state, measured = advance(state, iterators, step)
        step += 1
        # of the step before: fetching this one's would stall the device
        _report(run, stage, bar, pending)
        due = step % log.every == 0 or step == training.steps
        pending = (step, measured) if due else None
        if preview and (step % log.preview_every == 0 or step == training.steps):
          run.writer.video(stage, step, "samples", preview(state))
        stopping = stop.requested(step)
        if stopping or step % log.checkpoint_every == 0 or step == training.steps:
          # a checkpoint of NaNs would take the place of a good one
          _check_finite(stage, step, measured)
          # what a checkpoint has behind it is in the log
          pending = _report(run, stage, bar, pending)
          checkpoints.save(step, state, state.ema, iterators, force=True)
    checkpoints.wait()
  if stopping:
    print(
      f"{stage}: stopped and saved at step {step}; the same command goes on from there",
      file=sys.stderr,
    )
    raise Preempted(128 + (stop.signal or 15))


def _report(run: Run, stage: str, bar: Progress, pending) -> None:
  if pending is not None:
    step, measured = pending
    values = _fetch(measured)
    run.writer.scalars(stage, step, values)
    bar.update(step, loss=values["loss"])
    _check_finite(stage, step, values)


def _check_finite(stage: str, step: int, measured: Mapping) -> None:
  bad = [name for name, value in _fetch(measured).items() if not np.isfinite(value)]
  if bad:
    raise UserError(
      f"{stage}: {', '.join(bad)} is not finite at step {step}; the last checkpoint is from "
      "before; "
      f"start again in another workdir with a lower learning rate or a lower {stage}.clip"
    )


def _fetch(measured: Mapping) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(dict(measured)).items()}


def print_parameters(stage: str, params: PyTree) -> None:
  """The parameter table, as clu prints it."""
  from clu import parameter_overview  # slow to import, and only a first start needs it

  print(
    f"\n{stage}\n{parameter_overview.get_parameter_overview(params, include_stats=False)}",
    file=sys.stderr,
  )
