"""The matrix products of a training rollout: what its blocks see, and no more.

Counted from the traced program, against sums over blocks written down here: no slot that is empty
or hidden, no context that is encoded twice, no block that is denoised for nobody.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import needed_flops
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import bind
from hiar_jax.planning import flops
from hiar_jax.rollout import exit_step
from tests.helpers import tiny
from tests.helpers.slow_cases import few

K, N, TURNS = 2, 4, 1.5  # frames of a block, blocks, mean number of levels before the exit step
NETWORK = dataclasses.replace(tiny.CONFIG, attention="blockwise")
TOKENS = NETWORK.tokens(tiny.HEIGHT, tiny.WIDTH)
TEXT = tiny.text().shape[1]
ROWS = {
  "HiAR": MethodConfig(block=K, window=0),
  "HiAR, window": MethodConfig(block=K, window=2 * K),
  "attached": MethodConfig(block=K, window=0, gradient="attached"),
  "Self-Forcing": MethodConfig(block=K, window=0, order="block_first", level="clean"),
  "SAF": MethodConfig(block=K, window=0, level="input", gradient="attached"),
}


def forward(frames: float, keys: float) -> float:
  """Of one clip."""
  return needed_flops.forward(NETWORK, frames, keys, TOKENS, TEXT)


def shown(frames: float, keys: float) -> float:
  """For K/V alone: without the head."""
  head = 2 * frames * TOKENS * math.prod(NETWORK.patch) * NETWORK.channels * NETWORK.dim
  return forward(frames, keys) - head


def pair(row: MethodConfig, n: int) -> float:
  """The context of block n - 1 and block n: each sees those before it, and itself."""
  return forward(2 * K, (seen(row, n - 1) + seen(row, n)) / 2)


def seen(row: MethodConfig, n: int) -> int:
  """The frames that block n sees, its own included."""
  return min((n + 1) * K, row.window or N * K)


def sweep(row: MethodConfig, blocks: int = N) -> float:
  return forward(K, K) + sum(pair(row, n) for n in range(1, blocks))


def parallel(row: MethodConfig, blocks: int, cost=forward) -> float:
  """One forward of all blocks, each seeing those before it."""
  return cost(blocks * K, sum(seen(row, n) for n in range(blocks)) / blocks)


def expected(name: str, gradient: bool) -> float:
  row = ROWS[name]
  if name == "SAF":
    return (TURNS + 1) * parallel(row, N)
  if name == "Self-Forcing":
    steps = lambda n: forward(K, seen(row, n))
    # each block: the levels before the exit, the exit step, and its context, the last's for nobody
    before = sum(TURNS * steps(n) for n in range(N))
    others = sum(steps(n) + shown(K, seen(row, n)) for n in range(N - 1))
    return before + others + (parallel(row, N) if gradient else steps(N - 1))
  down = TURNS * sweep(row)
  if not gradient:
    return down + sweep(row)
  # until every context is there: not the last block, but the context before it
  exits = sweep(row, N - 1) + (0 if name == "attached" else shown(K, seen(row, N - 2)))
  again = parallel(row, N - 1, shown) if name == "attached" else 0
  return down + exits + again + parallel(row, N)


UPDATES = [f"{name}, {whose}" for name in ROWS for whose in ("critic", "generator")]


@pytest.mark.parametrize("update", few(UPDATES, "HiAR, generator"))
def test_no_product_is_in_vain(update):
  name, whose = update.rsplit(", ", 1)
  row, gradient = ROWS[name], whose == "generator"
  run = exit_step.self_rollout if gradient else exit_step.self_rollout_without_gradient
  noise = tiny.lookup(tiny.noise_table(row, N))

  def rollout(params, level):
    bound = bind(NETWORK, params, jnp.asarray(tiny.text()))
    return run(bound, noise, row.at(tiny.SIGMAS), tiny.shape(N * K), level)

  params = jax.eval_shape(lambda: tiny.params(NETWORK))
  found = flops.count(rollout, params, jnp.asarray(1), turns=TURNS)
  assert found == pytest.approx(tiny.BATCH * expected(name, gradient), rel=1e-6)
