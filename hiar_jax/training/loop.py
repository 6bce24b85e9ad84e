"""The training loop of every stage: update, log the previous update, save, stop when asked.

The order within a step decides whether a resumed run repeats an uninterrupted one exactly: update,
log, preview, save. A checkpoint holds the state and the position of the data iterators after the
same step.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import sys
import warnings

from etils import epath
import jax
import numpy as np

from hiar_jax.checkpoints import checksums
from hiar_jax.checkpoints.on_disk import CHECKPOINTS
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import Damaged, UserError
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import put_batch
from hiar_jax.parallel.rules import sharded_shapes
from hiar_jax.preemption import Preemption
from hiar_jax.progress import Progress, is_writer
from hiar_jax.training.pretrained import Start
from hiar_jax.training.run import Run
from hiar_jax.training.state import TrainState
from hiar_jax.training.updates import Stage
from hiar_jax.types import Batch, Params, PyTree


class Preempted(SystemExit):
  """Raised when a stage has saved its state after a signal; the same command continues there."""


class DataIterators:
  """Several batch iterators that are saved and restored as one.

  latest: the last metrics of updates that do not come in every step, by the update's name. They are
  saved too, so that a resumed run logs what an uninterrupted one does.
  """

  def __init__(self, run: Run, **iterators):
    self._run = run
    self._iterators = iterators
    self.latest: dict[str, dict[str, jax.Array | float]] = {}

  def next(self, name: str, *others: str) -> Batch:
    """Returns the next batch as global arrays [b ...], encoded (Run.encode), with `example_id`, the
    rows' indices; others: iterators whose batches join it.
    """
    batch = dict(next(self._iterators[name]))
    local = len(batch["tokens"])
    # Noise is drawn by example_id: an example gets the same on any number of devices and hosts.
    batch["example_id"] = np.arange(local, dtype=np.int32) + local * jax.process_index()
    batch = self._run.encode(put_batch(batch, self._run.mesh))
    return {**batch, **{other: self.next(other) for other in others}}

  # What Grain's checkpoint handler calls, which wants bytes:

  def get_state(self) -> bytes:
    states = {name: iterator.get_state() for name, iterator in self._iterators.items()}
    states |= {name: jax.tree.map(float, found) for name, found in self.latest.items()}
    return json.dumps(states).encode()

  def set_state(self, state: bytes) -> None:
    states = json.loads(state)
    for name, iterator in self._iterators.items():
      iterator.set_state(states[name])
    self.latest = {name: dict(states[name]) for name in self.latest}

  def start_prefetch(self) -> None:
    """Does nothing: the iterators read ahead from their next use."""


def is_done(run: Run, stage: str, steps: int) -> bool:
  """Returns True where the stage's last checkpoint exists and is undamaged.

  Raises UserError where the stage should come from `stages_from` and has no such checkpoint there.
  """
  last = epath.Path(run.directory(stage)) / CHECKPOINTS / str(steps)
  try:
    if last.is_dir():
      checksums.check(last)
      return True
  except Damaged:
    pass  # run_stage restores the checkpoint before it, with a warning, and trains on from there
  if run.borrows(stage):
    raise not_there(run, stage, last)
  return False


def not_there(run: Run, stage: str, where: object) -> UserError:
  """Returns the error for a stage that should come from `stages_from` and cannot."""
  return UserError(
    f"stages_from = {run.experiment.stages_from!r}: its {stage} is not there, not finished or "
    f"damaged ({where}); run the command that made it once more"
  )


def run_stage(
  run: Run,
  stage: Stage,
  *,
  starts: Sequence[Start] = (),
  frozen: Sequence[PyTree] = (),
  iterators: DataIterators,
  preview: Callable[[TrainState], np.ndarray] | None = None,
  inference: Callable[[TrainState], Params] = lambda state: state.ema,
) -> None:
  """Runs a stage to its last step, from its newest checkpoint or from stage.create(*starts).

  Of stage.updates those that are due in a step come in their order; the last one is due in every
  step and its loss is the stage's. starts: weights, loaded for `create` alone and given up to it.
  frozen: what each update's step reads and nobody trains; () = nothing. inference: state -> the
  network's weights that a checkpoint holds for its users. preview: state -> clips uint8
  [b F H W 3] for the log. Raises Preempted after SIGTERM or SIGINT, once the state is saved, and
  UserError where a metric is not finite.
  """
  log, mesh, name, last = run.experiment.log, run.experiment.mesh, stage.name, stage.config.steps
  # known before there is any array, so that no device ever holds an unsharded state
  shapes = jax.eval_shape(stage.create, *(start.shapes for start in starts))
  shardings = run.shardings(shapes, stage.rules)
  steps = [map_step(u.make_step, shardings, run.mesh, mesh.mapping) for u in stage.updates]
  frozen = frozen or [None] * len(steps)
  iterators.latest = {update.name: {} for update in stage.updates if update.due}
  with _checkpoints(run, name) as checkpoints:
    restored = checkpoints.restore(sharded_shapes(shapes, shardings), iterators)
    step, state = restored or (0, _created(stage.create, starts, shardings))
    # a killed run may have logged steps after its last checkpoint
    run.writer.resume(name, step)
    if not step and is_writer():
      print_parameters(name, shapes.params)
    pending, before, stopping = None, None, False
    with Preemption() as stop, Progress(name, last, initial=step) as bar:
      bar.wait_for("compiling the first update")
      while step < last and not stopping:
        for update, mapped, read in zip(stage.updates, steps, frozen, strict=True):
          if update.due is None or update.due(step):
            state, found = mapped(state, iterators.next(*update.feeds), read)
            if update.due:
              iterators.latest[update.name] = update.named(found)
            else:
              metrics = {"loss": found["loss"], **update.named(found)}
        for latest in iterators.latest.values():
          metrics |= latest
        jax.block_until_ready(before)  # no queue on the device: a signal would wait for all of it
        before = metrics["loss"]
        step += 1
        # Those of an earlier step: this one is only dispatched, fetching would wait for it.
        _report(run, name, bar, pending)
        pending = (step, metrics) if step % log.every == 0 or step == last else None
        if preview and (step % log.preview_every == 0 or step == last):
          run.writer.video(name, step, "samples", preview(state))
        stopping = stop.requested(step)
        if stopping or step % log.checkpoint_every == 0 or step == last:
          # before saving: NaNs would replace a good checkpoint; a run resumed here logs later steps
          _check_finite(name, step, metrics)
          _report(run, name, bar, pending)
          pending = None
          checkpoints.save(step, state, inference(state), iterators, force=True)
    checkpoints.wait()
  if stopping:
    print(
      f"{name}: stopped and saved at step {step}; the same command goes on from there",
      file=sys.stderr,
    )
    # 128 + signal, as a shell reports it; in a job of several processes no handler saw SIGTERM (15)
    raise Preempted(128 + (stop.signal or 15))


def _checkpoints(run: Run, stage: str) -> Checkpoints:
  e = run.experiment
  return Checkpoints(
    run.directory(stage) / CHECKPOINTS,
    keep=e.log.keep,
    config={"model": to_json(e.network_of(stage)), "stage": stage},
    free=e.free_fields,
  )


def _created(create: Callable, starts: Sequence[Start], shardings: PyTree) -> TrainState:
  """Returns the first state. The weights are arguments: closed over they would be constants of the
  program, and alive as long as it; donated, they become the state's where they fit.
  """
  trees = [start.load() for start in starts]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    donated = tuple(range(len(trees)))
    return jax.jit(create, out_shardings=shardings, donate_argnums=donated)(*trees)


def _report(run: Run, stage: str, bar: Progress, pending: tuple[int, Mapping] | None) -> None:
  """Logs and shows the metrics of a step, if there are any."""
  if pending is not None:
    step, metrics = pending
    values = _fetch(metrics)
    run.writer.scalars(stage, step, values)
    bar.update(step, loss=values["loss"])
    _check_finite(stage, step, values)


def _check_finite(stage: str, step: int, metrics: Mapping) -> None:
  bad = [name for name, value in _fetch(metrics).items() if not np.isfinite(value)]
  if bad:
    raise UserError(
      f"{stage}: {', '.join(bad)} is not finite at step {step}; the last checkpoint is from "
      "before; "
      f"start again in another workdir with a lower learning rate or a lower {stage}.clip"
    )


def _fetch(metrics: Mapping) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def print_parameters(stage: str, params: PyTree) -> None:
  """Prints the table of parameters, as clu formats it."""
  from clu import parameter_overview  # slow to import, and only a first start needs it

  print(
    f"\n{stage}\n{parameter_overview.get_parameter_overview(params, include_stats=False)}",
    file=sys.stderr,
  )
