"""How a block shows itself to its successors: the levels by name, and a level of one's own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import context, flow
from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.rollout import exit_step, sample
from hiar_jax.rollout.blocks import Step
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.plain_rollout import assert_same


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("output", context.Output()),
    ("clean", context.Clean()),
    ("input", context.Input()),
    ("fixed:0.3", context.Fixed(0.3)),
    ("fixed:5e-2", context.Fixed(0.05)),
  ],
)
def test_a_level_by_its_name(name, expected):
  assert context.of_name(name) == expected == MethodConfig(level=name).context


@pytest.mark.parametrize(
  "name",
  ["noisy", "", "Output", "output:0.3", "fixed", "fixed:", "fixed:low", "fixed:0.3:0.4", 0.3, None],
)
def test_a_name_that_is_no_level_is_refused_with_those_that_are(name):
  with pytest.raises(UserError) as raised:
    context.of_name(name)
  assert str(raised.value) == (
    f"history.level = {name!r}: expected one of clean, fixed, input, output; `fixed` takes a "
    "number, as fixed:0.1"
  )


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, "nan", "inf"])
def test_a_fixed_level_lies_between_data_and_noise(level):
  with pytest.raises(UserError, match="a fixed context level lies between 0 and 1, got "):
    context.of_name(f"fixed:{level}")


@pytest.mark.parametrize(
  ("name", "sigma", "latent", "drawn"),
  [
    ("output", 0.6, 2.0, 0),
    ("clean", 0.0, 3.0, 0),
    ("input", 0.9, 1.0, 0),
    ("fixed:0.25", 0.25, 0.75 * 3 + 0.25 * 8, 1),
  ],
)
def test_what_a_block_shows_and_the_noise_it_takes(name, sigma, latent, drawn):
  """From 0.9 to 0.6; x, x_next and x0 are full of 1, 2 and 3, the noise of 8."""
  level, draws = context.of_name(name), []

  def noised(x0):
    draws.append(1)
    return flow.add_noise(x0, jnp.full((1, 1, 1, 1, 1), 8.0), level.sigma(0.9, 0.6))

  latents = (jnp.full((1, 1, 1, 1, 1), value) for value in (1.0, 2.0, 3.0))
  np.testing.assert_allclose(level.latent(*latents, noised), latent, rtol=1e-6)
  assert len(draws) == drawn
  assert level.sigma(0.9, 0.6) == sigma
  # of several steps at once, in their type and shape
  many = level.sigma(jnp.asarray([0.9, 0.8], jnp.float32), jnp.asarray([0.6, 0.0], jnp.float32))
  assert many.dtype == jnp.float32
  np.testing.assert_allclose(many, [level.sigma(0.9, 0.6), level.sigma(0.8, 0.0)], rtol=1e-6)


def test_a_contexts_noise_is_drawn_behind_that_of_the_levels():
  """And never where a step draws its own, so that no two are the same."""
  method, drawn = MethodConfig(level="fixed:0.25").at(tiny.SIGMAS), []

  def noise(level, n):
    drawn.append((level, n))
    return jnp.zeros((1, 3, 1, 1, 1))

  x = jnp.ones((1, 3, 1, 1, 1))
  for level in range(method.levels):
    Step(method, level, 5).finish(x, x, noise)
  assert drawn == [(1, 5), (4, 5), (2, 5), (5, 5), (3, 5), (6, 5)]


# -- a level of one's own


@dataclasses.dataclass(frozen=True)
class Halfway:
  """The block between its input and output."""

  weight: float = 0.5
  free = False
  of_x0 = False

  def sigma(self, sigma, sigma_next):
    return (1 - self.weight) * sigma + self.weight * sigma_next

  def latent(self, x, x_next, x0, noised):
    return (1 - self.weight) * x + self.weight * x_next


@dataclasses.dataclass(frozen=True)
class FreeInput(Halfway):
  """The block's input, by another class than the package's."""

  weight: float = 0.0
  free = True


@pytest.fixture
def halfway(monkeypatch):
  monkeypatch.setitem(context.LEVELS, "halfway", Halfway)
  monkeypatch.setitem(context.LEVELS, "free", FreeInput)


def video(level: str, **options) -> np.ndarray:
  row = MethodConfig(block=2, window=5, sink=1, level=level, **options)
  table = tiny.noise_table(row, 3)
  run = quick_jit(
    lambda bound: sample.rollout(bound, tiny.lookup(table), row.at(tiny.SIGMAS), tiny.shape(6))
  )
  return np.asarray(run(tiny.bind("toy")))


def test_a_class_with_a_name_is_a_level_like_any_other(halfway):
  assert MethodConfig(level="halfway:0.2").context == Halfway(0.2)
  with pytest.raises(UserError, match="one of clean, fixed, free, halfway, input, output"):
    MethodConfig(level="no such")
  assert_same(video("halfway:0"), video("input"))
  assert_same(video("halfway:1"), video("output"))
  assert_same(video("free"), video("input"))
  # it is made of what a finished block has lost
  with pytest.raises(UserError, match="level = 'halfway': block_first"):
    MethodConfig(level="halfway", order="block_first")
  between = video("halfway")
  for level in ("input", "output", "clean"):
    assert np.abs(between - video(level))[:, 2:].max() > 1e-3


@pytest.mark.parametrize("level", ["halfway", "free"])
def test_its_exit_step_is_the_sequential_ones(halfway, level):
  row = MethodConfig(block=2, window=5, sink=1, level=level)
  noise, method = tiny.lookup(tiny.noise_table(row, 3)), row.at(tiny.SIGMAS)

  def both(bound):
    arguments = bound, noise, method, tiny.shape(6), 1
    return (
      exit_step.self_rollout(*arguments),
      exit_step.self_rollout_without_gradient(*arguments),
    )

  parallel, sequential = quick_jit(both)(tiny.bind("toy"))
  assert_same(parallel, sequential)
