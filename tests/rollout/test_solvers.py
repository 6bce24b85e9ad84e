"""Solvers on a flow that is known exactly, and UniPC against its algorithm written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.rollout import solvers
from tests.helpers import tiny

MEAN, SPREAD = 0.8, 0.3  # of the data: one Gaussian


def exact(eps, sigma):
  """x at a level of the flow that starts at eps: each quantile of the noise keeps its place."""
  return (1 - sigma) * MEAN + np.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2) * eps


def velocity(x, sigma):
  """eps - x0, each the mean of what x may be made of."""
  variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
  eps = sigma / variance * (x - (1 - sigma) * MEAN)
  x0 = MEAN + (1 - sigma) * SPREAD**2 / variance * (x - (1 - sigma) * MEAN)
  return eps - x0


def solved(solver: str, sigmas: np.ndarray):
  """The points in float64, from what the noise has become at the first level."""
  with jax.enable_x64(True):
    eps = jnp.asarray(exact(tiny.video(0, 3).astype(np.float64), sigmas[0]))
    levels = jnp.asarray(sigmas)
    run = jax.jit(
      lambda eps: solvers.solve(lambda x, j: velocity(x, levels[j]), eps, levels, solver)
    )
    return np.asarray(run(eps))


def error(solver: str, steps: int) -> float:
  """The largest of all points between two levels; at 0 the time of UniPC has no end."""
  sigmas = np.linspace(0.95, 0.3, steps + 1)
  points, eps = solved(solver, sigmas), tiny.video(0, 3).astype(np.float64)
  assert points.shape[0] == steps + 1 and points.dtype == np.float64
  return max(np.abs(x - exact(eps, s)).max() for x, s in zip(points, sigmas, strict=True))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2), ("unipc_framepack", 3)])
def test_order_of_convergence(solver, order):
  coarse, fine = error(solver, 32), error(solver, 64)
  assert fine < 1.25 * coarse / 2**order


def test_unipc_needs_fewer_steps():
  assert error("unipc", 16) < 0.3 * error("euler", 16)
  assert error("unipc_framepack", 16) < 0.03 * error("unipc", 16)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_points_that_are_not_kept_are_not_held(solver):
  """As many as are asked for, in their order, and no array of all levels."""
  levels, eps, keep = jnp.asarray(np.linspace(0.95, 0.3, 8)), jnp.ones((2, 5)), (0, 3, 7)
  run = lambda eps, keep=keep: solvers.solve(
    lambda x, j: velocity(x, levels[j]), eps, levels, solver, keep
  )
  np.testing.assert_allclose(run(eps), run(eps, None)[jnp.asarray(keep)], rtol=1e-6)
  text = lambda keep: str(jax.make_jaxpr(functools.partial(run, keep=keep))(eps))
  assert "[8,2,5]" in text(None) and "[8,2,5]" not in text(keep) and "[7,2,5]" not in text(keep)


def written_out(eps, sigmas, order: int, exponential: bool, clock, alpha, lower: bool):
  """UniPC, x0 predictions in a list: the published loops step by step."""
  x, guess, found, kept, change_of = eps, eps, [], [], []
  for j, sigma in enumerate(sigmas[:-1]):
    x0 = guess - sigma * velocity(guess, sigma)
    if j:
      h, base, scale, nodes, differences = change_of
      system = np.stack([np.asarray([*nodes, 1.0]) ** k for k in range(len(nodes) + 1)])
      wanted, phi, factorial = [], np.expm1(-h) / -h - 1, 1
      for k in range(1, len(nodes) + 2):
        wanted.append(phi * factorial / (np.expm1(-h) if exponential else -h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
      rho = np.asarray([0.5]) if not nodes else np.linalg.solve(system, wanted)
      change = [*differences, x0 - kept[0]]
      x = base + scale * sum(r * d for r, d in zip(rho, change, strict=True))
    found.append(x)
    if j == len(sigmas) - 2:
      return [*found, x0]
    used = min(order, j + 1, len(sigmas) - 1 - j if lower else order)
    kept = [x0, *kept]
    h = clock(sigmas[j + 1]) - clock(sigma)
    ratio = sigmas[j + 1] / sigma
    nodes = [(clock(sigmas[j - i]) - clock(sigma)) / h for i in range(1, used)]
    differences = [(kept[i] - x0) / node for i, node in enumerate(nodes, 1)]
    base = ratio * x + (1 - ratio) * x0
    scale = 1 - ratio if exponential else alpha(sigmas[j + 1]) * h
    rho = [0.5] * len(nodes)
    if len(nodes) == 2:
      system = np.stack([np.asarray(nodes) ** k for k in range(2)])
      phi1 = np.expm1(-h) / -h - 1
      b = np.expm1(-h) if exponential else -h
      rho = np.linalg.solve(system, [phi1 / b, 2 * (phi1 / -h - 0.5) / b])
    guess = base + scale * sum(r * d for r, d in zip(rho, differences, strict=True))
    change_of[:] = h, base, scale, nodes, differences


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("solver", ["unipc", "unipc_framepack"])
def test_unipc_is_its_algorithm(solver, steps):
  sigmas = flow.sigma_schedule(steps, 2.0)
  points = solved(solver, sigmas)
  if solver == "unipc":
    clock = lambda s: np.log1p(-min(s, 1 - 1e-6)) - np.log(min(s, 1 - 1e-6))
    want = written_out(points[0], sigmas, 2, True, clock, lambda s: 1 - s, True)
  else:
    order = max(min(3, steps - 1), 1)
    clock = lambda s: -np.log(s)
    want = written_out(points[0], sigmas, order, False, clock, lambda s: 1.0, False)
  np.testing.assert_allclose(points, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["unipc", "unipc_framepack"])
def test_levels_that_end_above_0(solver):
  """As the first points of the whole, but for the last: nothing corrects that one."""
  with jax.enable_x64(True):
    eps, levels = (
      jnp.asarray(tiny.video(0, 3), jnp.float64),
      jnp.asarray(flow.sigma_schedule(9, 2.0)),
    )
    go = lambda levels: solvers.solve(lambda x, j: velocity(x, levels[j]), eps, levels, solver)
    whole, part = np.asarray(go(levels)), np.asarray(go(levels[:6]))
  np.testing.assert_allclose(part[:5], whole[:5], rtol=0, atol=1e-12)
  assert 0 < np.abs(part[5] - whole[5]).max() < 0.02


def test_in_float32():
  levels = np.asarray(flow.sigma_schedule(25, 5.0), np.float32)
  eps = jnp.asarray(tiny.video(0, 3))
  got = solvers.solve(
    lambda x, j: velocity(x, jnp.asarray(levels)[j]), eps, jnp.asarray(levels), "unipc"
  )
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, solved("unipc", flow.sigma_schedule(25, 5.0)), atol=2e-5)
