"""Distillation's two steps: what no gradient passes, what each of them needs, and how often each
comes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.parallel.mesh import MeshConfig
from hiar_jax.training import distill
from hiar_jax.training import state as states
from hiar_jax.training.distill import DistillConfig, Frozen, Networks
from tests.helpers.slow_cases import slow
from tests.helpers.training_steps import (
  BATCH,
  HIAR,
  MODEL,
  NEGATIVE,
  SHAPE,
  SIGMAS,
  Case,
  compiled_quickly,  # noqa: F401
  linear_optimizer,  # noqa: F401
  make_batch,
  make_case,
  make_params,
  run,
)

HISTORIES = {
  "HiAR": HIAR,
  "Self-Forcing": dataclasses.replace(HIAR, order="block_first", level="clean"),
  "Self-Aligned Forcing": dataclasses.replace(
    HIAR, level="input", gradient="attached", sink=1, sink_level="clean"
  ),
}


def influence(case: Case, of: str, on: str) -> float:
  """The largest derivative of the network `on` after an update, along a change of the network `of`
  before it.
  """
  state, batch = jax.jit(case.create)(), jax.tree.map(jnp.asarray, make_batch(0))

  def update(changed):
    frozen = case.frozen._replace(real_score=changed) if of == "teacher" else case.frozen
    given = state if of == "teacher" else state.replace(**{of: changed})
    return getattr(case.step(given, batch, frozen)[0], on)

  start = case.frozen.real_score if of == "teacher" else getattr(state, of)
  direction = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), start)
  tangent = jax.jit(lambda: jax.jvp(update, (start,), (direction,))[1])()
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(jax.device_get(tangent)))


@pytest.mark.parametrize(
  "kind, of, on",
  [
    ("critic", "params", "critic"),
    *slow(("generator", "critic", "params"), ("generator", "teacher", "params")),
  ],
)
def test_no_gradient_passes_between_networks(kind, of, on):
  """They see each other's outputs as numbers: the derivative is exactly zero, though the update
  depends on them.
  """
  assert influence(make_case(kind), of, on) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Self-Aligned Forcing", "Self-Forcing"])
def test_the_rivals_go_through_the_same_step(name):
  state, metrics = run(
    make_case("generator", method=HISTORIES[name], weight=0.0, guidance=0.0), MeshConfig(data=1), 1
  )
  assert np.isfinite(list(metrics.values())).all() and metrics["grad_norm"] > 0
  assert "forward_kl" not in metrics
  before = make_params(0)
  assert all(
    (np.asarray(a) != np.asarray(b)).any()
    for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
  )


@pytest.mark.slow
def test_without_forward_kl_no_trajectories_are_needed():
  batch = {name: make_batch(0)[name] for name in ("text", "example_id")}

  def shapes(weight):
    case = make_case("generator", weight=weight)
    return jax.eval_shape(case.step, jax.eval_shape(case.create), batch, case.frozen)[1]

  assert "forward_kl" not in shapes(0.0)
  with pytest.raises(KeyError, match="trajectories"):
    shapes(0.1)


@pytest.mark.parametrize(
  "ratio, warmup, steps, expected",
  [(5, 0, 12, [0, 5, 10]), (1, 0, 3, [0, 1, 2]), (2, 3, 8, [3, 5, 7]), (5, 20, 12, [])],
)
def test_the_critic_is_trained_more_often_and_first(ratio, warmup, steps, expected):
  config = DistillConfig(
    steps=steps, batch=8, lr=1.0, critic_lr=1.0, critic_updates=ratio, critic_warmup=warmup
  )
  assert [i for i in range(steps) if config.updates_generator(i)] == expected
  assert config.generator_steps == len(expected)


def test_the_average_counts_the_generator_s_own_updates(monkeypatch):
  """Five critic updates to each, after a warm-up of ten."""
  monkeypatch.setattr(distill, "update_ema", lambda ema, params, updates, config: updates)
  config = DistillConfig(
    steps=50, batch=BATCH, lr=0.02, critic_lr=0.03, critic_updates=5, critic_warmup=10
  )
  networks = Networks(MODEL, MODEL, MODEL)
  step = distill.make_generator_step(
    config, networks, HIAR.at(SIGMAS), SHAPE, config.generator_optimizer(networks.student)
  )
  state = states.create_state(
    jax.random.key(7),
    make_params(0),
    config.generator_optimizer(networks.student),
    make_params(1),
    config.critic_optimizer(networks.critic),
  )
  batch = jax.tree.map(jnp.asarray, make_batch(0))
  frozen = Frozen(make_params(2), NEGATIVE)
  count = jax.jit(lambda i: step(state.replace(step=i), batch, frozen)[0].ema)
  turns = [i for i in range(30) if config.updates_generator(i)]
  assert [int(count(i)) for i in turns] == [0, 1, 2, 3]
