"""Distribution matching distillation: samples move along the difference of two scores.

HiAR, Eq. 5, with the normalisation of its published code (from DMD2, arXiv 2405.14867):

    x_t  = add_noise(x, eps, sigma)
    real = x0_real(x_t | text) + g (x0_real(x_t | text) - x0_real(x_t | negative text))
    grad = (x0_fake(x_t | text) - real) / mean |x - real|          per sample
    loss = 1/2 mean |x - stop(x - grad)|^2                         so that dloss/dx = grad / size

Published: g = 3, which is guidance scale 4. The published code takes the loss in float64; this is
float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.models.frames import Bound, whole_clip
from hiar_jax.types import Video, typed


class Scores(NamedTuple):
  """The networks whose difference moves the generator: the critic and the teacher with the text,
  and the teacher with the negative text.
  """

  fake: Bound
  real: Bound
  negative: Bound


def score_x0(bound: Bound, x_t: Video, sigma) -> Video:
  """Returns the x0 prediction of a bidirectional network."""
  return flow.x0_from_velocity(x_t, bound(whole_clip(x_t, sigma)).velocity[0], sigma)


@typed
def dmd_gradient(scores: Scores, x: Video, eps: Video, sigma: jax.Array, guidance: float) -> Video:
  """Returns grad of the module's docstring, which may hold values that are not finite.

  sigma: scalar, [b] or [b f]. The negative score is unused where guidance is 0.
  """
  x_t = flow.add_noise(x, eps, sigma)
  x0_real = score_x0(scores.real, x_t, sigma)
  if guidance:
    x0_real = flow.classifier_free_guidance(
      x0_real, score_x0(scores.negative, x_t, sigma), guidance
    )
  # [b 1 1 1 1]: each sample's gradient is scaled by its own distance to the real score
  scale = jnp.mean(jnp.abs(x - x0_real), axis=range(1, x.ndim), keepdims=True)
  return (score_x0(scores.fake, x_t, sigma) - x0_real) / scale


def finite(gradient: Video) -> tuple[Video, jax.Array]:
  """Returns the gradient with zeros for NaN, as published, and the share of values that are not
  finite: a sample that meets the real score exactly has scale 0; more are a teacher that is broken.
  """
  return jnp.nan_to_num(gradient), jnp.mean(~jnp.isfinite(gradient), dtype=jnp.float32)


@typed
def dmd(x: Video, gradient: Video) -> jax.Array:
  """Returns the surrogate loss [b], whose gradient in x is `gradient` / (elements of a sample)."""
  # stop_gradient: neither score network receives any, only the generator that made x
  target = jax.lax.stop_gradient(flow.to_f32(x) - flow.to_f32(gradient))
  return 0.5 * jnp.mean((flow.to_f32(x) - target) ** 2, axis=range(1, x.ndim))
