"""The student as the stages use it: its video for tokens and seeds, in the run's own order, window
and sink.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.method import History
from hiar_jax.models import dit
from hiar_jax.rollout.noise import block_noise, empty_cache
from hiar_jax.rollout.sample import rollout
from hiar_jax.training.run import Run


def make_generator(run: Run, frames: int, history: History | None = None):
  """generate(params, tokens [b l], seeds [b], given=None) -> latents [b frames h w c].

  frames: latent ones. A video depends on its own prompt and seed, not on the batch.
  given: clean first frames, whole blocks (not counted in `frames`).
  """
  e = run.experiment
  history = history or e.history
  sigmas, key = jnp.asarray(run.sigmas), jax.random.fold_in(jax.random.key(e.seed), 3)

  @jax.jit
  def generate(params, tokens, seeds, given=None):
    total = frames + (0 if given is None else given.shape[1])
    return rollout(
      dit.bind(e.student_dit, params, run.task.embed(tokens)),
      block_noise(key, seeds, history, run.task),
      empty_cache(e.student_dit, history, run.task, tokens.shape[0], total),
      sigmas,
      history,
      frames // history.block,
      given=given,
    )

  return generate


def preview(run: Run, tokens: np.ndarray):
  """state -> clips of the training length, for the log."""
  generate = make_generator(run, run.experiment.latent_sizes["frames"])
  return lambda state: run.pixels(generate(state.ema, tokens, np.arange(len(tokens))))
