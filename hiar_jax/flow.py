"""Flow matching: the line between data and noise, and the noise levels to walk along it.

Time runs from noise to data: t = 1 is noise, t = 0 is data (HiAR, arXiv 2603.08703, Eq. 1-3).

    x_t     = (1 - sigma) x0 + sigma eps            (1)   eps ~ N(0, I)
    v       = eps - x0 = dx_t / dsigma              (2)   what the network predicts
    sigma   = s t / (1 + (s - 1) t)                 (3)   s = shift, more time near the noise
    x0      = x_t - sigma v                         (4)   from (1) and (2)
    x_{t'}  = x_t + (sigma' - sigma) v              (5)   Euler step

Everything here is computed in float32 or wider whatever the model's dtype: near sigma = 1 the bits
that bfloat16 drops are the whole signal. Schedules are float64 numpy, fixed before anything is
traced.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError

TIMESTEPS = 1000  # the network is fed TIMESTEPS * sigma, as Wan2.1 was trained


def shift_sigma(t, shift: float):
  """Eq. (3). Works on numpy and jax arrays and on plain floats; keeps 0 and 1 fixed."""
  return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(steps: int, shift: float) -> np.ndarray:
  """`steps + 1` levels from 1 to 0, evenly spaced in t: what `steps` Euler steps walk over.

  float64.
  """
  return shift_sigma(np.linspace(1.0, 0.0, steps + 1), shift)


def shifted_schedule(timesteps: tuple[float, ...], shift: float) -> np.ndarray:
  """The student's levels [s + 1]: nominal timesteps such as (1000, 750, 500, 250) shifted, then 0.

  For shift 5: 1, .9375, .8333, .625, 0 (HiAR, section 4.1 and its published `denoising_step_list`).
  """
  t = np.asarray(tuple(timesteps) + (0.0,), np.float64) / TIMESTEPS
  if t.size < 2 or t[0] > 1 or (np.diff(t) >= 0).any() or t[-2] <= 0:
    raise UserError(
      f"timesteps must fall from at most {TIMESTEPS} and stay above 0, got {tuple(timesteps)}"
    )
  return shift_sigma(t, shift)


def timestep(sigma):
  """sigma in [0, 1] -> what the network's time embedding is fed."""
  return TIMESTEPS * sigma


def to_f32(x) -> jax.Array:
  """At least float32."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def expand_like(sigma, like: jax.Array) -> jax.Array:
  """Appends axes to `sigma` (scalar, [b] or [b f]) until it broadcasts against `like` [b f ...]."""
  sigma = to_f32(sigma)
  return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(x0: jax.Array, eps: jax.Array, sigma) -> jax.Array:
  """Eq. (1). sigma: scalar, [b] or [b f]."""
  sigma = expand_like(sigma, x0)
  return (1 - sigma) * to_f32(x0) + sigma * to_f32(eps)


def velocity_target(x0: jax.Array, eps: jax.Array) -> jax.Array:
  """Eq. (2)."""
  return to_f32(eps) - to_f32(x0)


def x0_from_velocity(x_t: jax.Array, v: jax.Array, sigma) -> jax.Array:
  """Eq. (4)."""
  return to_f32(x_t) - expand_like(sigma, x_t) * to_f32(v)


def velocity_from_x0(x_t: jax.Array, x0: jax.Array, sigma) -> jax.Array:
  """The inverse of Eq. (4); sigma must not be 0."""
  return (to_f32(x_t) - to_f32(x0)) / expand_like(sigma, x_t)


def euler(x_t: jax.Array, v: jax.Array, sigma, sigma_next) -> jax.Array:
  """Eq. (5)."""
  return to_f32(x_t) + (expand_like(sigma_next, x_t) - expand_like(sigma, x_t)) * to_f32(v)


def classifier_free_guidance(
  conditional: jax.Array, unconditional: jax.Array, guidance: float
) -> jax.Array:
  """conditional + g (conditional - unconditional); g = 0 is no guidance, g = 3 what others call
  scale 4. For v or x0 alike.
  """
  return conditional + guidance * (conditional - unconditional)
