"""Flow matching against its formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.errors import UserError
from tests.helpers import tiny

X0, EPS = tiny.random(1, 2, 3, 4, 4, 2), tiny.random(2, 2, 3, 4, 4, 2)
SIGMAS = {
  "scalar": np.float32(0.3),
  "per_example": np.asarray([0.1, 0.9], np.float32),
  "per_frame": np.linspace(0.05, 0.95, 6, dtype=np.float32).reshape(2, 3),
}
each_sigma = pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)


def wide(sigma) -> np.ndarray:
  """float64, broadcastable against the clips."""
  sigma = np.asarray(sigma, np.float64)
  return sigma.reshape(sigma.shape + (1,) * (5 - sigma.ndim))


def assert_close(actual, expected):
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@each_sigma
def test_formulas(sigma):
  s, x0, eps = wide(sigma), X0.astype(np.float64), EPS.astype(np.float64)
  x_t, v = (1 - s) * x0 + s * eps, eps - x0
  assert_close(flow.add_noise(X0, EPS, sigma), x_t)
  assert_close(flow.velocity_target(X0, EPS), v)
  x_t32, v32 = x_t.astype(np.float32), v.astype(np.float32)
  assert_close(flow.x0_from_velocity(x_t32, v32, sigma), x0)
  # divides by sigma >= .05
  np.testing.assert_allclose(flow.velocity_from_x0(x_t32, X0, sigma), v, atol=3e-5)
  assert_close(flow.euler(x_t32, v32, sigma, sigma / 2), (1 - s / 2) * x0 + s / 2 * eps)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_shift(shift):
  t = np.linspace(0, 1, 11)
  sigma = flow.shift_sigma(t, shift)
  np.testing.assert_allclose(sigma, [shift * x / (1 + (shift - 1) * x) for x in t], rtol=1e-14)
  assert sigma[0] == 0 and sigma[-1] == 1
  np.testing.assert_allclose(flow.shift_sigma(jnp.asarray(t), shift), sigma, rtol=2e-6)


def test_schedule_walks_from_noise_to_data():
  sigmas = flow.sigma_schedule(4, 3.0)
  assert sigmas.dtype == np.float64
  np.testing.assert_allclose(
    sigmas, [1, 3 * 0.75 / 2.5, 3 * 0.5 / 2, 3 * 0.25 / 1.5, 0], rtol=1e-14
  )


def test_published_levels():
  np.testing.assert_allclose(
    flow.shifted_schedule((1000, 750, 500, 250), 5), [1, 0.9375, 5 / 6, 0.625, 0], rtol=1e-14
  )
  np.testing.assert_allclose(flow.shifted_schedule((600,), 1), [0.6, 0])


@pytest.mark.parametrize(
  "timesteps", [(), (1001, 500), (500, 500), (500, 750), (500, 0), (500, -1)], ids=str
)
def test_levels_that_do_not_fall_are_refused(timesteps):
  with pytest.raises(UserError, match="must fall from at most 1000 and stay above 0"):
    flow.shifted_schedule(timesteps, 5)


def test_timestep():
  assert flow.timestep(0.25) == 250


def test_sixteen_bit_latents_are_widened():
  """1 - sigma at sigma = .999 is below bfloat16's resolution near 1."""
  half = jnp.ones((1, 1, 1, 1, 1), jnp.bfloat16)
  x_t = flow.add_noise(half, 0 * half, 0.999)
  assert x_t.dtype == jnp.float32
  np.testing.assert_allclose(x_t.ravel(), 0.001, rtol=1e-3)
  results = (
    flow.velocity_target(half, half),
    flow.x0_from_velocity(half, half, 0.5),
    flow.velocity_from_x0(half, half, 0.5),
    flow.euler(half, half, 0.5, 0.25),
  )
  assert {result.dtype for result in results} == {jnp.dtype("float32")}


def test_guidance():
  np.testing.assert_allclose(flow.classifier_free_guidance(2.0, 0.5, 3.0), 2 + 3 * 1.5)
  np.testing.assert_allclose(flow.classifier_free_guidance(2.0, 0.5, 0.0), 2)
