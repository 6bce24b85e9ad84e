"""A training state of two arrays with its optimizer, saved after every update."""

import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiar_jax.checkpoints.training_state import Checkpoints

CONFIG = {"width": 16, "heads": {"count": 2}, "levels": (1.0, 0.5)}
OPTIMIZER = optax.adamw(1e-2)


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  ema: Any
  opt: Any
  key: jax.Array


def make(width: int = 16, ema: bool = False) -> State:
  params = {
    "in": {"kernel": jnp.arange(8.0 * width).reshape(8, width)},
    "out": jnp.ones((width,), jnp.bfloat16),
  }
  return State(
    jnp.int32(0), params, params if ema else None, OPTIMIZER.init(params), jax.random.key(7)
  )


def advance(state: State) -> State:
  key = jax.random.fold_in(state.key, state.step)
  gradient = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), state.params)
  update, opt = OPTIMIZER.update(gradient, state.opt, state.params)
  return state.replace(
    step=state.step + 1, params=optax.apply_updates(state.params, update), opt=opt
  )


def numbers(state: Any) -> list[np.ndarray]:
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(state)]


def assert_same(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(numbers(a), numbers(b), strict=True):
    np.testing.assert_array_equal(x, y)


def save_steps(directory: pathlib.Path, steps: int, **kwargs: Any) -> list[State]:
  states = [advance(make())]
  with Checkpoints(directory, config=CONFIG, **kwargs) as checkpoints:
    for step in range(1, steps + 1):
      assert checkpoints.save(step, states[-1], states[-1].params)
      states.append(advance(states[-1]))
  return states  # states[i] is the one of step i + 1
