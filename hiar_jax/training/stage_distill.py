"""Stage 5: distillation.

The student comes from causal init, the critic from the teacher, or both from published weights.
"""

import jax
import jax.numpy as jnp

from hiar_jax.parallel.mesh import map_step
from hiar_jax.training import distill, loop, pretrained, student_sampler
from hiar_jax.training.run import Run
from hiar_jax.training.state import create


class Latest:
  """The generator's last metrics, logged beside the critic's.

  Saved with the feeds, so that a resumed run logs what a straight one does.
  """

  def __init__(self):
    self.metrics: dict[str, jax.Array | float] = {}

  def get_state(self) -> dict[str, float]:
    return {name: float(value) for name, value in self.metrics.items()}

  def set_state(self, state: dict[str, float]) -> None:
    self.metrics = dict(state)


def run(run: Run) -> None:
  """Writes <workdir>/distill."""
  e, config = run.experiment, run.experiment.distill
  if loop.is_done(run, "distill", config.steps):
    return
  real, base, start = (
    pretrained.load_real(run),
    pretrained.load(run),
    pretrained.load_weights(run, "causal_init"),
  )
  key = jax.random.fold_in(jax.random.key(e.seed), 5)
  who = distill.Student(
    e.student_dit,
    e.dit,
    e.teacher_dit,
    e.history,
    jnp.asarray(run.sigmas),
    run.task,
    jnp.asarray(run.point_sigmas),
  )
  latest = Latest()
  feeds = {"prompts": run.clips("data", config.batch, (), salt=5), "generator": latest}
  if config.forward_kl.weight:
    feeds["trajectories"] = run.clips("trajectories", config.batch, ("trajectory",), salt=6)

  def update(shardings):
    spread = lambda step: map_step(step, shardings, run.mesh, e.mesh.mapping)
    critic = spread(distill.make_critic_step(config, who))
    generator = spread(distill.make_generator_step(config, who))

    def both(state, feeds, step):
      """Generator first, when it is its turn; the critic always."""
      if config.updates_generator(step):
        batch = feeds.next("prompts")
        if config.forward_kl.weight:
          batch["held"] = feeds.next("trajectories")
        state, now = generator(state, batch, real)
        latest.metrics = {f"generator_{name}": value for name, value in now.items()}
      state, critic_measured = critic(state, feeds.next("prompts"))
      names = {f"critic_{name}": value for name, value in critic_measured.items()}
      return state, {"loss": critic_measured["loss"], **names, **latest.metrics}

    return both

  loop.train(
    run,
    "distill",
    config,
    create=lambda: create(
      key, start, config.generator_optimizer(), base, config.critic_optimizer()
    ),
    update=update,
    feeds=loop.Feeds(run, **feeds),
    preview=student_sampler.preview(run, pretrained.preview_tokens(run)),
  )
