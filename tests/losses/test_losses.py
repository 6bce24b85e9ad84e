"""Each loss against its formula in float64, and where its gradient may not go."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.losses import critic, dmd, flow_matching, forward_kl, trajectory
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Bound, Out, bind
from tests.helpers import tiny
from tests.helpers.masked import frame_mask

X, EPS = tiny.video(1, 4), tiny.video(2, 4)
SIGMA = jnp.asarray([0.3, 0.8])
ROW = MethodConfig(block=2, window=0)
LEVELS = jnp.asarray(tiny.SIGMAS)
CAUSAL = np.kron(np.tri(2, dtype=bool), np.ones((2, 2), bool))  # between blocks of two frames
POINTS = tiny.random(3, tiny.BATCH, LEVELS.size, 4, tiny.HEIGHT, tiny.WIDTH, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
  """v = slope x + offset sigma of params (slope, offset); a frame sees itself alone.

  calls: the (groups, past) of every forward; its K/V are names.
  """

  channels: int = 2
  calls: list[Any] = dataclasses.field(default_factory=list)

  def apply(self, params, groups, texts, past=(), start=None) -> Out:
    del texts, start
    self.calls.append((groups, past))
    slope, offset = params
    velocity = [slope * g.x + offset * flow.expand_like(jnp.asarray(g.sigma), g.x) for g in groups]
    return Out(tuple(velocity), tuple(f"kv of group {n}" for n in range(len(groups))))


def linear(slope, offset=0.0) -> Bound:
  return bind(Linear(), (slope, offset), tiny.text())


class Never:
  """A network that may not be called."""

  def apply(self, *_):
    raise AssertionError("this network was called")


def never(*_):
  raise AssertionError("no noise is drawn here")


NEVER = bind(Never(), None, tiny.text())


def only_call(bound: Bound):
  """(x [b f h w c], sigma [b f], positions [f], mask, past) of a network's only forward."""
  ((groups, past),) = bound.network.calls
  return (*joined(groups), frame_mask(groups, ()), past)


def joined(groups):
  """Groups -> (x [b f h w c], sigma [b f], positions [f])."""
  frames = lambda g: jnp.broadcast_to(flow.expand_like(jnp.asarray(g.sigma), g.x), g.x.shape)
  x = np.concatenate([g.x for g in groups], axis=1)
  sigma = np.concatenate([frames(g)[..., 0, 0, 0] for g in groups], axis=1)
  return x, sigma, np.concatenate([g.positions for g in groups])


def wide(sigma):
  return np.asarray(sigma, np.float64)[:, None, None, None, None]


def mean(errors) -> np.ndarray:
  return np.mean(np.square(errors), axis=(1, 2, 3, 4))


def noised():
  return (1 - wide(SIGMA)) * X + wide(SIGMA) * EPS


# -- flow matching and the critic


@pytest.mark.parametrize("loss", [flow_matching.flow_matching, critic.critic])
def test_velocity_regression(loss):
  expected = mean(0.7 * noised() + 0.2 * wide(SIGMA) - (EPS.astype(np.float64) - X))
  np.testing.assert_allclose(
    loss(linear(0.7, 0.2), jnp.asarray(X), EPS, SIGMA), expected, rtol=1e-5
  )


def test_flow_matching_takes_a_level_per_frame():
  sigma = np.linspace(0.1, 0.9, 8, dtype=np.float32).reshape(2, 4)
  s = sigma.astype(np.float64)[..., None, None, None]
  expected = mean(0.7 * ((1 - s) * X + s * EPS) - (EPS.astype(np.float64) - X))
  loss = flow_matching.flow_matching(linear(0.7), X, EPS, jnp.asarray(sigma))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [flow_matching.flow_matching, critic.critic])
def test_all_frames_see_each_other(loss):
  bound = linear(0.7)
  loss(bound, jnp.asarray(X), EPS, SIGMA)
  x, sigma, positions, mask, past = only_call(bound)
  np.testing.assert_allclose(x, noised(), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(sigma, np.repeat(SIGMA[:, None], 4, axis=1))
  assert positions.tolist() == [0, 1, 2, 3] and mask is None and past == ()


def test_the_critic_does_not_train_the_generator():
  gradient = jax.grad(lambda x: critic.critic(linear(0.7), x, EPS, SIGMA).sum())(jnp.asarray(X))
  assert not np.asarray(gradient).any()
  teacher = jax.grad(lambda x: flow_matching.flow_matching(linear(0.7), x, EPS, SIGMA).sum())(
    jnp.asarray(X)
  )
  assert np.asarray(teacher).any()


def test_drawn_levels_are_shifted_then_clamped():
  keys = jax.random.split(jax.random.key(0), 200)
  plain = np.asarray(flow_matching.sample_sigma(keys, 1.0))
  assert 0 <= plain.min() < 0.1 and 0.9 < plain.max() <= 1 and len(set(plain.tolist())) == 200
  shifted = np.asarray(flow_matching.sample_sigma(keys, 5.0, 0.3, 0.9))
  np.testing.assert_allclose(shifted, np.clip(5 * plain / (1 + 4 * plain), 0.3, 0.9), rtol=1e-5)


# -- distribution matching


def dmd_reference(guidance: float) -> np.ndarray:
  x_t, s = noised(), wide(SIGMA)
  x0 = lambda slope: x_t - s * slope * x_t
  real = x0(0.4) + guidance * (x0(0.4) - x0(-0.3))
  return (x0(0.9) - real) / np.mean(np.abs(X - real), axis=(1, 2, 3, 4), keepdims=True)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_dmd_gradient(guidance):
  scores = dmd.Scores(linear(0.9), linear(0.4), linear(-0.3) if guidance else NEVER)
  gradient = dmd.dmd_gradient(scores, X, EPS, SIGMA, guidance)
  expected = dmd_reference(guidance)
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_dmd_gradient_of_a_perfect_sample_is_finite():
  zero, scores = jnp.zeros_like(X), dmd.Scores(linear(0.0), linear(0.0), NEVER)
  gradient, lost = dmd.finite(dmd.dmd_gradient(scores, zero, zero, SIGMA, 0.0))
  np.testing.assert_array_equal(gradient, zero)
  assert lost == 1


def test_values_of_the_gradient_that_are_lost_are_counted():
  broken = np.ones_like(X)
  broken[0, 0, 0, 0, 0] = np.nan
  broken[1, 0, 0, 0, :2] = np.inf
  gradient, lost = dmd.finite(jnp.asarray(broken))
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(lost, 3 / X.size, rtol=1e-6)


def test_dmd_surrogate_hands_the_gradient_to_x():
  gradient = tiny.video(4, 4)
  loss, slope = jax.value_and_grad(lambda x: dmd.dmd(x, gradient).sum())(jnp.asarray(X))
  np.testing.assert_allclose(loss, 0.5 * mean(gradient.astype(np.float64)).sum(), rtol=1e-5)
  np.testing.assert_allclose(slope, gradient / X[0].size, rtol=0, atol=1e-6)


def test_dmd_trains_neither_score_and_x_through_the_surrogate_alone():
  def loss(x, fake, real, negative):
    scores = dmd.Scores(linear(fake), linear(real), linear(negative))
    return dmd.dmd(x, dmd.dmd_gradient(scores, x, EPS, SIGMA, 3.0)).sum()

  slope, *scores = jax.grad(loss, argnums=(0, 1, 2, 3))(jnp.asarray(X), 0.9, 0.4, -0.3)
  assert [float(score) for score in scores] == [0, 0, 0]
  expected = dmd_reference(3.0) / X[0].size
  np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# -- regression on trajectories


def test_points_at_levels():
  levels = np.asarray([[0, 0, 2, 2], [3, 3, 1, 1]])
  picked = np.asarray(trajectory.at_levels(jnp.asarray(POINTS), jnp.asarray(levels)))
  for b in range(2):
    for f in range(4):
      np.testing.assert_array_equal(picked[b, f], POINTS[b, levels[b, f], f])


@pytest.mark.parametrize("shared", [False, True])
def test_drawn_level_indices(shared):
  keys = jax.random.split(jax.random.key(1), 40)
  drawn = np.asarray(trajectory.sample_levels(keys, 3, 6, 2, shared))
  assert drawn.shape == (40, 6) and set(drawn.ravel().tolist()) == {0, 1, 2}
  blocks = drawn.reshape(40, 3, 2)
  assert (blocks[..., 0] == blocks[..., 1]).all()
  assert (blocks[:, 0] == blocks[:, 1]).all() == shared


def test_trajectory():
  levels = np.asarray([[0, 0, 2, 2], [1, 1, 1, 1]])
  x = np.take_along_axis(POINTS, levels[:, None, :, None, None, None], axis=1)[:, 0].astype(
    np.float64
  )
  s = tiny.SIGMAS.astype(np.float64)[levels][..., None, None, None]
  expected = mean(x - s * 0.7 * x - POINTS[:, -1])
  loss = trajectory.trajectory(linear(0.7), jnp.asarray(POINTS), jnp.asarray(levels), LEVELS, ROW)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("level", ["output", "clean", "input"])
def test_trajectory_shows_what_the_rollout_will_show(level):
  """The forwards that it makes: which points at which levels are context, and which are noisy."""
  levels = np.asarray([[0, 0, 2, 2], [1, 1, 0, 0]])
  bound = linear(0.7)
  row = MethodConfig(block=2, window=0, level=level, gradient="attached")
  loss = trajectory.trajectory_with_history(
    bound, jnp.asarray(POINTS), jnp.asarray(levels), LEVELS, row, never
  )
  pick = lambda index: np.take_along_axis(POINTS, index[:, None, :, None, None, None], axis=1)[:, 0]
  noisy, s = pick(levels), tiny.SIGMAS[levels]
  *contexts, (groups, past) = bound.network.calls
  x, sigma, positions = joined(groups)
  np.testing.assert_allclose(x, noisy)
  np.testing.assert_allclose(sigma, s)
  assert positions.tolist() == [0, 1, 2, 3]
  np.testing.assert_allclose(
    loss, mean(noisy - s[..., None, None, None] * 0.7 * noisy - POINTS[:, -1]), rtol=1e-5
  )
  if level == "input":
    assert not contexts and past == ()
    np.testing.assert_array_equal(frame_mask(groups, ()), CAUSAL)
    return
  shown = levels + 1 if level == "output" else np.full_like(levels, 3)
  ((context, before),) = contexts
  x, sigma, positions = joined(context)
  np.testing.assert_allclose(x, pick(shown)[:, :2])  # the last block is shown to nobody
  np.testing.assert_allclose(sigma, tiny.SIGMAS[shown][:, :2])
  assert positions.tolist() == [0, 1] and before == () and past == ("kv of group 0",)
  # over [context | noisy]: the second block sees the first as context, and both see themselves
  np.testing.assert_array_equal(
    frame_mask(groups, (2,)), np.kron([[0, 1, 0], [1, 0, 1]], np.ones((2, 2))).astype(bool)
  )


def test_a_context_level_draws_its_own_noise():
  """fixed:0.3: the ends, with the noise that is given for them."""
  levels, bound = np.zeros((2, 4), int), linear(0.7)
  row = MethodConfig(block=2, window=0, level="fixed:0.3", gradient="attached")
  trajectory.trajectory_with_history(
    bound, jnp.asarray(POINTS), jnp.asarray(levels), LEVELS, row, lambda: jnp.asarray(EPS)
  )
  x, sigma, _ = joined(bound.network.calls[0][0])
  np.testing.assert_allclose(x, (0.7 * POINTS[:, -1] + 0.3 * EPS)[:, :2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(sigma, np.full((2, 2), 0.3), rtol=1e-6)


# -- forward-KL


@pytest.mark.parametrize("step", [0, 1, 2])
def test_forward_kl_forms(step):
  x, x_next, end = (POINTS[:, i].astype(np.float64) for i in (step, step + 1, -1))
  sigma, lower = (float(tiny.SIGMAS[i]) for i in (step, step + 1))
  v, chord = 0.7 * x + 0.2 * sigma, (x_next - x) / (lower - sigma)
  expected = {
    "velocity": mean(v - chord),
    "x0": sigma**2 * mean(v - chord),
    "end": mean(x - sigma * v - end),
  }
  for target in forward_kl.TARGETS:
    loss = forward_kl.forward_kl(
      linear(0.7, 0.2), jnp.asarray(POINTS), step, LEVELS, ROW, target=target
    )
    np.testing.assert_allclose(loss, expected[target], rtol=1e-4)


def test_forward_kl_with_the_teachers_own_levels():
  """Chord and its x0 at the levels where the points lie, the student asked at its own."""
  step, own = 1, np.asarray([1.0, 0.95, 0.7, 0.0])
  x, x_next = (POINTS[:, i].astype(np.float64) for i in (step, step + 1))
  sigma, v = float(tiny.SIGMAS[step]), 0.7 * x
  chord = (x_next - x) / (own[2] - own[1])
  loss = forward_kl.forward_kl(
    linear(0.7),
    jnp.asarray(POINTS),
    step,
    LEVELS,
    ROW,
    target="x0",
    point_sigmas=jnp.asarray(own, jnp.float32),
  )
  np.testing.assert_allclose(loss, mean((x - sigma * v) - (x - own[1] * chord)), rtol=1e-4)


def test_forward_kl_attention():
  """Bidirectional by default; causal only where asked for."""

  def mask(**asked):
    bound = linear(0.7)
    forward_kl.forward_kl(bound, jnp.asarray(POINTS), 0, LEVELS, ROW, **asked)
    *_, mask, past = only_call(bound)
    assert past == ()
    return mask

  assert set(forward_kl.ATTENTIONS) == {"bidirectional", "causal"}
  assert mask(attention="bidirectional") is None
  np.testing.assert_array_equal(mask(attention="causal"), CAUSAL)
  assert mask() is None
