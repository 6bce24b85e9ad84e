"""One case of every kind of training step, on a DiT of a few hundred numbers: its state, batches
and updates on any devices.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax import flow
from hiar_jax.method import MethodConfig
from hiar_jax.models.dit import DiTConfig
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import tree_shardings
from hiar_jax.training import causal_init, distill, teacher
from hiar_jax.training import state as states
from hiar_jax.training.distill import DistillConfig, ForwardKLConfig, Frozen, Networks
from hiar_jax.types import LatentShape

MODEL = DiTConfig(
  dim=16, ffn_dim=16, num_heads=2, num_layers=1, patch=(1, 1, 1), channels=4, text_dim=8, freq_dim=8
)
HIAR = MethodConfig(block=1, window=3)
SHAPE = LatentShape(frames=3, height=1, width=2, channels=4)
NEGATIVE = jnp.zeros((1, 4, 8))
SIGMAS = np.asarray(flow.shifted_schedule((1000, 500), 5.0), np.float32)
BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
  """These tests compile much and compute little."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def linear_optimizer():
  """AdamW divides by the gradient's size, so that of a parameter without influence its rounding
  would be seen at full scale.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(optax, "adamw", lambda rate, **_: optax.sgd(rate, momentum=0.9))
    yield


def make_batch(step: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  text = rng.normal(size=(BATCH, 4, 8)).astype(np.float32)
  latents = rng.normal(size=(BATCH, *SHAPE.clip)).astype(np.float32)
  trajectory = rng.normal(size=(BATCH, len(SIGMAS), *SHAPE.clip)).astype(np.float32)
  return {
    "latents": latents,
    "trajectory": trajectory,
    "text": text,
    "example_id": np.arange(BATCH, dtype=np.int32),
    "trajectories": {"trajectory": trajectory, "text": text[::-1].copy()},
  }


@functools.cache
def shapes_of(model):
  """What `model.init` would return, as shapes."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0)))


def make_params(seed: int):
  """Random weights, none of them zero: a fresh network's head is, and would hide all that is behind
  it.
  """
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim < 2), jnp.float32),
    shapes_of(MODEL),
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """One kind of step: create() -> state; make_step(mean=...) -> step(state, batch, frozen)."""

  create: Callable
  make_step: Callable
  frozen: Any = None

  @functools.cached_property
  def step(self):
    """The step of one device."""
    return self.make_step()


def make_case(
  kind: str,
  accumulate: int = 1,
  method: MethodConfig = HIAR,
  weight: float = 0.1,
  guidance: float = 1.0,
) -> Case:
  common = {
    "steps": 10,
    "batch": BATCH,
    "lr": 0.02,
    "accumulate": accumulate,
    "clip": 0.5,
    "ema_decay": 0.9,
  }
  key = jax.random.key(7)
  if kind == "teacher":
    config = teacher.TeacherConfig(**common, caption_dropout=0.5)
    make_step = functools.partial(teacher.make_step, config, MODEL, config.optimizer(MODEL))
    create = lambda: states.create_state(key, make_params(0), config.optimizer(MODEL))
    return Case(create, make_step, NEGATIVE)
  if kind.startswith("causal init"):
    config = causal_init.CausalInitConfig(**common, shows=kind.split(", ")[1])
    make_step = functools.partial(
      causal_init.make_step, config, MODEL, method, SIGMAS, config.optimizer(MODEL)
    )
    return Case(
      lambda: states.create_state(key, make_params(0), config.optimizer(MODEL)), make_step
    )
  config = DistillConfig(
    **common, critic_lr=0.03, guidance=guidance, forward_kl=ForwardKLConfig(weight=weight)
  )
  create = lambda: states.create_state(
    key,
    make_params(0),
    config.generator_optimizer(MODEL),
    make_params(1),
    config.critic_optimizer(MODEL),
  )
  made_of = config, Networks(MODEL, MODEL, MODEL), method.at(SIGMAS), SHAPE
  if kind == "critic":
    make_step = functools.partial(
      distill.make_critic_step, *made_of, config.critic_optimizer(MODEL)
    )
    return Case(create, make_step)
  make_step = functools.partial(
    distill.make_generator_step, *made_of, config.generator_optimizer(MODEL)
  )
  return Case(create, make_step, Frozen(make_params(2), NEGATIVE))


def run(case: Case, mesh_config: MeshConfig, devices: int, updates: int = 5):
  """-> (state after `updates`, the last metrics)."""
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    shapes, rules = jax.eval_shape(case.create), MODEL.sharding_rules
    shardings = tree_shardings(shapes, mesh, rules, min_shard=mesh_config.min_shard)
    state = jax.jit(case.create, out_shardings=shardings)()
    frozen = jax.device_put(case.frozen, replicated(mesh))
    step = map_step(case.make_step, shardings, mesh, mesh_config.mapping)
    for i in range(updates):
      state, metrics = step(state, put_batch(make_batch(i), mesh), frozen)
      # the critic counts the steps, and is not here
      if isinstance(case.frozen, Frozen):
        state = state.replace(step=state.step + 1)
  return state, {name: float(value) for name, value in metrics.items()}
