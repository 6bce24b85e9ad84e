"""Flow matching: the straight path between data and noise, and the noise levels along it.

Time runs from noise to data: t = 1 is noise, t = 0 is data (HiAR, arXiv 2603.08703, Eq. 1-3).

    x_t     = (1 - sigma) x0 + sigma eps            (1)   eps ~ N(0, I)
    v       = eps - x0 = dx_t / dsigma              (2)   what the network predicts
    sigma   = s t / (1 + (s - 1) t)                 (3)   s = shift, more time near the noise
    x0      = x_t - sigma v                         (4)   from (1) and (2)
    x_{t'}  = x_t + (sigma' - sigma) v              (5)   Euler step

Everything here is computed in float32 or wider whatever the model's dtype: near sigma = 1 the
factor 1 - sigma of the signal is smaller than the rounding of bfloat16. Schedules are float64
numpy, computed before anything is traced.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError

TIMESTEPS = 1000  # the network is fed TIMESTEPS * sigma, as Wan2.1 was trained


def shift_sigma(t, shift: float):
  """Returns sigma of t in [0, 1], Eq. (3), for numpy and jax arrays and floats; keeps 0 and 1."""
  return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(steps: int, shift: float) -> np.ndarray:
  """Returns `steps + 1` levels from 1 to 0 for `steps` Euler steps, even in t; float64."""
  return shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift)


def shifted_schedule(timesteps: tuple[float, ...], shift: float) -> np.ndarray:
  """Returns the student's levels [s + 1], float64: the shifted nominal timesteps, then 0.

  (1000, 750, 500, 250) at shift 5 give 1, 0.9375, 0.8333, 0.625, 0 (HiAR, section 4.1, and
  `denoising_step_list` of its published code). Raises UserError unless the timesteps fall strictly.
  """
  t = np.asarray(tuple(timesteps) + (0.0,), np.float64) / TIMESTEPS
  # t[-1] is the appended 0, t[-2] the last nominal timestep
  if t.size < 2 or t[0] > 1 or (np.diff(t) >= 0).any() or t[-2] <= 0:
    raise UserError(
      f"timesteps must fall from at most {TIMESTEPS} and stay above 0, got {tuple(timesteps)}"
    )
  return shift_sigma(t, shift)


def timestep(sigma):
  """Returns the input of the network's time embedding, in [0, 1000], for sigma in [0, 1]."""
  return TIMESTEPS * sigma


def to_f32(x) -> jax.Array:
  """Casts to float32, and leaves wider types alone."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def expand_like(sigma, like: jax.Array) -> jax.Array:
  """Appends axes to `sigma` (scalar, [b] or [b f]) until it broadcasts against `like` [b f ...]."""
  # leading axes line up: a level per example, or per frame of each example
  sigma = to_f32(sigma)
  return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(x0: jax.Array, eps: jax.Array, sigma) -> jax.Array:
  """Returns x_t of Eq. (1); x0, eps [b f ...], sigma scalar, [b] or [b f]."""
  sigma = expand_like(sigma, x0)
  return (1 - sigma) * to_f32(x0) + sigma * to_f32(eps)


def velocity_target(x0: jax.Array, eps: jax.Array) -> jax.Array:
  """Returns the velocity eps - x0, Eq. (2)."""
  return to_f32(eps) - to_f32(x0)


def x0_from_velocity(x_t: jax.Array, v: jax.Array, sigma) -> jax.Array:
  """Returns the x0 that a velocity v at x_t implies, Eq. (4); sigma as in `add_noise`."""
  return to_f32(x_t) - expand_like(sigma, x_t) * to_f32(v)


def velocity_from_x0(x_t: jax.Array, x0: jax.Array, sigma) -> jax.Array:
  """Returns the velocity that leads from x0 to x_t: Eq. (4) solved for v; sigma must not be 0."""
  return (to_f32(x_t) - to_f32(x0)) / expand_like(sigma, x_t)


def euler(x_t: jax.Array, v: jax.Array, sigma, sigma_next) -> jax.Array:
  """Returns x at `sigma_next` by one Euler step, Eq. (5)."""
  return to_f32(x_t) + (expand_like(sigma_next, x_t) - expand_like(sigma, x_t)) * to_f32(v)


def classifier_free_guidance(
  conditional: jax.Array, unconditional: jax.Array, guidance: float
) -> jax.Array:
  """Returns conditional + g (conditional - unconditional), for velocities or x0 predictions.

  g = 0 is no guidance; g is the usual guidance scale minus 1, so g = 3 is scale 4.
  """
  return conditional + guidance * (conditional - unconditional)
