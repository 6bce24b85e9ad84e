"""UniPC against diffusers' scheduler, on a flow without a network.

Needs the extra `[parity]` (torch, diffusers).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.rollout import solvers
from tests.helpers import tiny

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn


def velocity(x, sigma, module):
  return module.sin(3 * x) + (1 + sigma) * x


def published(eps: np.ndarray, sigmas: np.ndarray, order: int, kind: str) -> list[np.ndarray]:
  """What diffusers' loop gives: the guess at each level, and the end."""
  from diffusers import UniPCMultistepScheduler
  import torch

  scheduler = UniPCMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=1.0,
    solver_order=order,
    solver_type=kind,
    final_sigmas_type="zero",
  )
  scheduler.set_timesteps(len(sigmas) - 1)
  # its own levels have no such shift, and are float32
  scheduler.sigmas = torch.from_numpy(sigmas)
  scheduler.set_begin_index(0)
  x, corrected = torch.from_numpy(eps), []
  for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
    x = scheduler.step(velocity(x, float(sigma), torch), t, x).prev_sample
    corrected.append(scheduler.last_sample.numpy())
  return [*corrected, x.numpy()]


@pytest.mark.parametrize(("order", "kind"), [(2, "bh2"), (2, "bh1"), (3, "bh1"), (3, "bh2")])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 16, 50])
def test_unipc(steps, order, kind):
  """Every level's x: within 1e-9 in float64, where the first level is 1 - 1e-6, as there."""
  sigmas = flow.sigma_schedule(steps, 5.0)
  sigmas[0] -= 1e-6
  eps = tiny.video(0, 3).astype(np.float64)
  rule = solvers.UniPC(order, exponential=kind == "bh2", snr=True)
  with jax.enable_x64(True):
    levels = jnp.asarray(sigmas)
    got = solvers._unipc(lambda x, j: velocity(x, levels[j], jnp), jnp.asarray(eps), levels, rule)
  want = np.stack(published(eps, sigmas, order, kind))
  if kind == "bh1":  # at level 0 it multiplies 0 by infinity
    assert np.isnan(want[-1]).all()
    got, want = got[:-1], want[:-1]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_the_named_one_in_float32_from_noise():
  sigmas = flow.sigma_schedule(25, 5.0).astype(np.float32)
  near = sigmas.copy()
  near[0] -= 1e-6
  eps, levels = tiny.video(0, 3), jnp.asarray(sigmas)
  got = solvers.solve(lambda x, j: velocity(x, levels[j], jnp), jnp.asarray(eps), levels, "unipc")
  want = np.stack(published(eps, near, 2, "bh2"))
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
