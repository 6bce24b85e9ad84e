"""Stage 3: the teacher's ODE trajectories at the student's noise levels, as a data set; or those
that others made.
"""

import jax
from jax.experimental import multihost_utils
import numpy as np

from hiar_jax.data import ode_pairs, pipeline
from hiar_jax.data.trajectories import TrajectoryWriter
from hiar_jax.training import pretrained
from hiar_jax.training.log import progress
from hiar_jax.training.run import Run


def run(run: Run) -> None:
  """Writes <workdir>/trajectories, part by part; parts that are there are kept, so a killed run
  goes on where it was.
  """
  e, config = run.experiment, run.experiment.trajectories
  if e.stages_from or not e.needs_trajectories:
    return
  if config.pairs:
    if jax.process_index() == 0:
      ode_pairs.prepare(
        run.directory("trajectories"), config.pairs, dtype=config.dtype, channels=e.codec.channels
      )
      run.medium.prepare(pipeline.read_captions(run.directory("trajectories")))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("trajectories")
    return
  writer = TrajectoryWriter(
    run.directory("trajectories"),
    list(map(float, e.trajectories.sigmas(e.student))),
    config.count,
    config.batch,
    dtype=config.dtype,
    recipe={
      "guidance": config.guidance,
      "steps": config.steps,
      "seed": e.seed,
      "teacher_steps": e.teacher.steps,
    },
  )
  if writer.complete:
    return
  captions, starts = (
    pipeline.read_captions(run.directory("data")),
    pipeline.read_starts(run.directory("data")),
  )
  params, walk = (
    pretrained.load(run),
    pretrained.make_walk(run, jax.random.fold_in(jax.random.key(e.seed), 2)),
  )
  missing = writer.missing_parts(jax.process_index(), jax.process_count())
  parts = -(-config.count // config.batch)
  with progress("trajectories", parts, initial=parts - len(missing)) as bar:
    for done, part in enumerate(missing, parts - len(missing) + 1):
      rows = np.asarray(writer.rows(part))
      clips = rows % len(captions)
      chosen, begin = [captions[i] for i in clips], np.asarray(starts, np.int32)[clips]
      writer.write_part(
        part, _padded(walk, params, run.tokens(chosen), rows, begin, config.batch), chosen, begin
      )
      bar.update(done)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("trajectories")
  if jax.process_index() == 0:
    writer.finish()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("trajectories data set")


def _padded(
  walk, params, tokens: np.ndarray, rows: np.ndarray, starts: np.ndarray, batch: int
) -> np.ndarray:
  """The last part is shorter: filled up to the batch, so that nothing is compiled twice."""
  fill = lambda array: np.pad(array, ((0, batch - len(rows)), *((0, 0),) * (array.ndim - 1)))
  return np.asarray(walk(params, fill(tokens), fill(rows), fill(starts)))[: len(rows)]
