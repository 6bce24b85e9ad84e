"""Stage 4: the block-causal student, started from the teacher and regressed on its trajectories."""

import jax

from hiar_jax.data.trajectories import check_sigmas
from hiar_jax.parallel.mesh import map_step
from hiar_jax.training import causal_init, loop, pretrained, student_sampler
from hiar_jax.training.run import Run
from hiar_jax.training.state import create


def run(run: Run) -> None:
  """Writes <workdir>/causal_init; nothing where weights.student stands for it."""
  e = run.experiment
  if e.weights.student or loop.is_done(run, "causal_init", e.causal_init.steps):
    return
  check_sigmas(run.directory("trajectories"), list(map(float, run.point_sigmas)))
  weights, key = pretrained.load(run), jax.random.fold_in(jax.random.key(e.seed), 4)
  step = causal_init.make_step(e.causal_init, e.student_dit, run.task, run.point_sigmas, e.history)

  def update(shardings):
    mapped = map_step(step, shardings, run.mesh, e.mesh.mapping)
    return lambda state, feeds, _: mapped(state, feeds.next("trajectories"))

  loop.train(
    run,
    "causal_init",
    e.causal_init,
    create=lambda: create(key, weights, e.causal_init.optimizer()),
    update=update,
    feeds=loop.Feeds(
      run, trajectories=run.clips("trajectories", e.causal_init.batch, ("trajectory",), salt=4)
    ),
    preview=student_sampler.preview(run, pretrained.preview_tokens(run)),
  )
