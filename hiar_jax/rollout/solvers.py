"""Solvers of the flow's ODE, from noise at the first level to the last one.

    euler           one step of the velocity, as HiAR's published scripts
    unipc           UniPC (arXiv 2302.04867) of order 2, B(h) = e^h - 1, as Wan2.1's pipelines and
                    diffusers have it: in log((1 - sigma) / sigma)
    unipc_framepack of order 3, B(h) = h, in -log(sigma), as FramePack's published code

UniPC predicts the next x from the last few x0 predictions, calls the network there, and corrects x
by what it says: one call a level, as Euler. Every update is a weighted sum of x and x0 predictions,
and the weights depend on the levels alone: `weights` computes them, in float64.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.types import Video

NEAR_ONE = 1 - 1e-6  # stands for level 1, of which the logarithm has no end (as diffusers)


@dataclasses.dataclass(frozen=True)
class UniPC:
  """order: x0 predictions that a step reads. exponential: B(h) = e^h - 1, else h. snr: steps are
  counted in log((1 - sigma) / sigma), else in -log(sigma).
  """

  order: int
  exponential: bool
  snr: bool


SOLVERS: dict[str, UniPC | None] = {
  "euler": None,
  "unipc": UniPC(2, exponential=True, snr=True),
  "unipc_framepack": UniPC(3, exponential=False, snr=False),
}


def solve(
  velocity: Callable[[Video, jax.Array], Video],
  eps: Video,
  sigmas: jax.Array,
  solver: str,
  keep: tuple[int, ...] | None = None,
) -> jax.Array:
  """Returns x at the levels of indices `keep` [len(keep) b ...], None = all; eps is the first's.

  velocity(x, j): of x at sigmas[j]. sigmas: falling; known while the program is traced where the
  solver is not euler. Points that are not kept are never in memory together.
  """
  rule = SOLVERS[solver]
  if rule is not None:
    return _unipc(velocity, eps, sigmas, rule, keep)
  points, put = _kept(eps, sigmas.size, keep)

  def step(carry, j):
    x, points = carry
    x = flow.euler(x, velocity(x, j), sigmas[j], sigmas[j + 1])
    return (x, put(points, j + 1, x)), None

  return jax.lax.scan(step, (eps, put(points, 0, eps)), jnp.arange(sigmas.size - 1))[0][1]


def _kept(eps: Video, levels: int, keep: tuple[int, ...] | None) -> tuple[jax.Array, Callable]:
  """Returns zeros for the points that are kept, and put(points, j, x), which drops all others."""
  keep = tuple(range(levels)) if keep is None else keep
  slots = np.full(levels, len(keep))
  slots[list(keep)] = np.arange(len(keep))
  table = jnp.asarray(slots)
  points = jnp.zeros((len(keep), *eps.shape), eps.dtype)
  return points, lambda points, j, x: points.at[table[j]].set(x, mode="drop")


def _unipc(
  velocity, eps: Video, sigmas: jax.Array, rule: UniPC, keep: tuple[int, ...] | None = None
) -> jax.Array:
  corrector, predictor = (
    jnp.asarray(x, eps.dtype) for x in weights(np.asarray(sigmas, np.float64), rule)
  )
  points, put = _kept(eps, sigmas.size, keep)

  def step(carry, j):
    guess, x, earlier, points = carry
    x0 = flow.x0_from_velocity(guess, velocity(guess, j), sigmas[j])
    x = jnp.tensordot(corrector[j], jnp.concatenate([jnp.stack([guess, x, x0]), earlier]), 1)
    earlier = jnp.concatenate([x0[None], earlier[:-1]])
    guess = jnp.tensordot(predictor[j], jnp.concatenate([x[None], earlier]), 1)
    return (guess, x, earlier, put(points, j, x)), None

  start = eps, eps, jnp.zeros((rule.order, *eps.shape), eps.dtype), points
  (last, _, _, points), _ = jax.lax.scan(step, start, jnp.arange(sigmas.size - 1))
  return put(points, sigmas.size - 1, last)


def weights(sigmas: np.ndarray, rule: UniPC) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights of each step but the last level: float64.

  corrector [s 3+order]: of the guess, the x before, the new x0 prediction, and the earlier ones,
  the newest first. predictor [s 1+order]: of x, the new prediction, and the earlier ones.
  """
  steps, order = len(sigmas) - 1, rule.order
  corrector, predictor = np.zeros((steps, 3 + order)), np.zeros((steps, 1 + order))
  corrector[0, 0] = 1.0
  times = _times(sigmas, rule)
  for j in range(steps):
    last = j == steps - 1 and sigmas[-1] == 0  # then x is the prediction, of whatever order
    used = 1 if last else min(order, j + 1, max(steps - 1, 1))
    if rule.snr:
      used = min(used, steps - j)  # lower orders at the end, as diffusers
    ratio = sigmas[j + 1] / sigmas[j]
    predictor[j, :2] = ratio, 1 - ratio
    if last:
      continue
    h = times[j + 1] - times[j]
    scale = 1 - ratio if rule.exponential else (1 - sigmas[j + 1] if rule.snr else 1.0) * h
    nodes = np.asarray([(times[j - i] - times[j]) / h for i in range(1, used)])
    along, against = _combination(h, nodes, rule)
    for i, (rho, node) in enumerate(zip(along, nodes, strict=True)):
      predictor[j, 2 + i] += scale * rho / node
      predictor[j, 1] -= scale * rho / node
    if j + 1 == steps:
      continue
    # the correction of x at j + 1, once the network was called there
    row = corrector[j + 1]
    row[1], row[2], row[3] = ratio, scale * against[-1], 1 - ratio - scale * against[-1]
    for i, (rho, node) in enumerate(zip(against[:-1], nodes, strict=True)):
      row[4 + i] += scale * rho / node
      row[3] -= scale * rho / node
  return corrector, predictor


def _times(sigmas: np.ndarray, rule: UniPC) -> np.ndarray:
  """Returns the time in which steps are counted, at each level; inf at 0."""
  with np.errstate(divide="ignore"):
    if not rule.snr:
      return -np.log(sigmas)
    below = np.minimum(sigmas, NEAR_ONE)
    return np.log1p(-below) - np.log(below)


def _combination(h: float, nodes: np.ndarray, rule: UniPC) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights of the differences (x0_i - x0) / node of a step of length h: of the
  predictor, and of the corrector, whose last node is the new level (UniPC, Eq. 5 to 9).
  """
  order = len(nodes) + 1
  scale = math.expm1(-h) if rule.exponential else -h
  # phi_k of the exponential integrator, by its recursion
  phi, factorial, wanted = math.expm1(-h) / -h - 1, 1, []
  for k in range(1, order + 1):
    wanted.append(phi * factorial / scale)
    factorial *= k + 1
    phi = phi / -h - 1 / factorial
  powers = np.vander([*nodes, 1.0], order, increasing=True).T
  wanted = np.asarray(wanted)
  # of order 1 and 2 the published ones are the simplified halves
  corrector = np.asarray([0.5]) if order == 1 else np.linalg.solve(powers, wanted)
  if order <= 2:
    return np.full(order - 1, 0.5), corrector
  return np.linalg.solve(powers[:-1, :-1], wanted[:-1]), corrector
