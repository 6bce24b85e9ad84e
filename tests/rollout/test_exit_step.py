"""The training rollout: the exit step in parallel equals the sequential one, in values and in
gradients.

The reference for gradients walks from block to block with a Python list for a cache, an entry per
frame. The toy shows the logic; the true network's gradients are in the recordings, and below for
attached history.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.models import frames
from hiar_jax.models.dit import KV
from hiar_jax.rollout import exit_step
from tests.helpers import masked, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.plain_rollout import ROWS, Plain, assert_same, sees, shown_at
from tests.helpers.slow_cases import few, slow

BLOCKS = 3
DETACHED_INPUT = dataclasses.replace(ROWS["self_aligned"], gradient="detached")
TRAINED = {
  **{name: row for name, row in ROWS.items() if name != "hiar_clean_sink"},  # see the last test
  "hiar_attached": MethodConfig(block=2, window=0, gradient="attached"),
  "clean_attached": MethodConfig(block=2, window=4, level="clean", gradient="attached"),
  "self_forcing_attached": MethodConfig(
    block=2, window=5, sink=1, order="block_first", level="clean", gradient="attached"
  ),
  "input_attached": MethodConfig(block=2, window=4, level="input", gradient="attached"),
  "self_aligned_detached": DETACHED_INPUT,
}
LEVELS = range(tiny.SIGMAS.size - 1)


def _noise(row: MethodConfig) -> np.ndarray:
  return tiny.noise_table(row, BLOCKS)


@functools.cache
def program(row: MethodConfig):
  """(table, exit level, weight) -> gradients of sum(x0 weight), (x0, exit_sample's); for all exit
  levels.
  """
  gradients = quick_jit(jax.grad(functools.partial(weighted_sum, tiny.Toy(), row), has_aux=True))
  return functools.partial(gradients, tiny.TOY_PARAMS)


def weighted_sum(network, row: MethodConfig, params, table, level, weight):
  """(sum(x0 weight), (x0, exit_sample's))."""
  bound = frames.bind(network, params, tiny.text())
  arguments = bound, tiny.lookup(table), row.at(tiny.SIGMAS), tiny.shape(BLOCKS * row.block), level
  x0 = exit_step.self_rollout(*arguments)
  return jnp.sum(x0 * weight), (x0, exit_step.self_rollout_without_gradient(*arguments))


def plain_x0(row: MethodConfig, level: int) -> np.ndarray:
  return np.concatenate(
    Plain("toy", row, BLOCKS * row.block, _noise(row)).rollout(BLOCKS, stop=level), axis=1
  )


def _walk(row: MethodConfig, params, noisy: list, sigma, context: list, skip: int = 0) -> list:
  """x0 of the noisy blocks >= skip, one at a time; context[m] = (latents, level) is what block m
  shows.
  """
  forward, kept, outputs = tiny.toy_forward(params), [], []

  def run(n, latents, level):
    visible = [p for p in range(len(kept)) if sees(n * row.block, p, row)]
    past = None
    if visible:
      past = KV(*(jnp.concatenate([kept[p][i] for p in visible], axis=2) for i in range(2)))
    positions = n * row.block + jnp.arange(row.block, dtype=jnp.int32)
    return forward(latents, level, positions, past=past)

  for n in range(BLOCKS):
    if n >= skip:
      outputs.append(noisy[n] - sigma * run(n, noisy[n], sigma)[0])
    _, kv = run(n, *context[n])
    kv = jax.lax.stop_gradient(kv) if row.gradient == "detached" else kv
    kept += [(kv.k[:, :, i : i + 1], kv.v[:, :, i : i + 1]) for i in range(row.block)]
  return outputs


def plain_gradients(row: MethodConfig, level: int, weight: np.ndarray):
  """Of sum(x0 weight): the latents before the exit step come from the plain loops and are
  constants.
  """
  table, k = _noise(row), row.block
  plain = Plain("toy", row, BLOCKS * k, table)
  sigma = tiny.SIGMAS[level]
  noisy, shown, head = plain.before(BLOCKS, level)

  def loss(params):
    if row.level == "input":
      context = [(x, sigma) for x in noisy]
    else:
      context = [(x, shown_at(row, level)) for x in shown]
    outputs = _walk(row, params, noisy, sigma, context)
    if head:
      clean = [(x, 0.0) for x in head] + context[len(head) :]
      outputs = outputs[: len(head)] + _walk(row, params, noisy, sigma, clean, skip=len(head))
    return jnp.sum(jnp.concatenate(outputs, axis=1) * weight)

  return quick_jit(jax.grad(loss))(tiny.TOY_PARAMS)


def assert_same_tree(actual, expected):
  jax.tree.map(assert_same, actual, expected)


def _weight(row: MethodConfig) -> np.ndarray:
  return tiny.video(31, BLOCKS * row.block)


# one of each kind of rollout; the last one's gradient passes through its history
QUICK = ("hiar_sink", "self_forcing_window", "self_aligned")


@pytest.mark.parametrize("name", few(TRAINED, *QUICK))
def test_values_equal_plain_loops_at_every_exit_level(name):
  row = TRAINED[name]
  for level in LEVELS:
    _, (x0, sample) = program(row)(_noise(row), level, _weight(row))
    assert_same(x0, plain_x0(row, level))
    assert_same(sample, x0)


AT_LEVELS = [(i % len(LEVELS), name) for i, name in enumerate(TRAINED)]


@pytest.mark.parametrize(
  ("level", "name"), few(AT_LEVELS, *(case for case in AT_LEVELS if case[1] in QUICK))
)
def test_gradients_equal_a_walk_over_blocks(name, level):
  row, weight = TRAINED[name], _weight(TRAINED[name])
  gradients, _ = program(row)(_noise(row), level, weight)
  assert_same_tree(gradients, plain_gradients(row, level, weight))


@pytest.mark.parametrize(
  "name", ["self_aligned", *slow("hiar_attached", "clean_attached", "input_attached")]
)
def test_attached_and_detached_history_differ_in_gradient_alone(name):
  attached = TRAINED[name]
  detached = dataclasses.replace(attached, gradient="detached")
  results = [program(row)(_noise(row), 1, _weight(row)) for row in (attached, detached)]
  assert_same(results[0][1][0], results[1][1][0])
  assert (
    np.abs(results[0][0]["value"] - results[1][0]["value"]).max()
    > 1e-3 * np.abs(results[0][0]["value"]).max()
  )


@dataclasses.dataclass(frozen=True)
class ParametersByLevel(tiny.Toy):
  """The toy; forwards over a frame above `exit_sigma` have parameters of their own."""

  exit_sigma: float = 0.0

  def apply(self, params, groups, texts, past=(), start=None):
    highest = functools.reduce(jnp.maximum, (jnp.max(g.sigma) for g in groups))
    choose = lambda before, at_exit: jnp.where(highest > self.exit_sigma, before, at_exit)
    return super().apply(
      jax.tree.map(choose, params["before"], params["exit"]), groups, texts, past, start
    )


@pytest.mark.parametrize("name", ["hiar_sink", *slow("self_forcing_window", "self_aligned")])
def test_the_exit_step_alone_is_differentiated(name):
  """With parameters of their own, the forwards before it get no gradient."""
  row, level = TRAINED[name], 1
  arguments = _noise(row), level, _weight(row)
  params = {"before": tiny.TOY_PARAMS, "exit": tiny.TOY_PARAMS}
  loss = functools.partial(
    weighted_sum, ParametersByLevel(exit_sigma=float(tiny.SIGMAS[level])), row
  )
  gradients, _ = quick_jit(jax.grad(loss, has_aux=True))(params, *arguments)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["before"]))
  assert_same_tree(gradients["exit"], program(row)(*arguments)[0])


@pytest.mark.parametrize("name", ["hiar_sink", "self_forcing_window", "self_aligned"])
def test_a_later_block_changes_no_earlier_x0(name):
  row, k = TRAINED[name], TRAINED[name].block
  table = _noise(row)
  other = table.copy()
  other[:, 2] = 3.0
  a, b = (np.asarray(program(row)(each, 1, _weight(row))[1][0]) for each in (table, other))
  np.testing.assert_array_equal(a[:, : 2 * k], b[:, : 2 * k])
  assert (a[:, 2 * k :] != b[:, 2 * k :]).any()


# -- teacher forcing


def _sensitivity(network: str, row: MethodConfig):
  """d x0[block 2] / d (context, noisy) of teacher forcing."""
  weight, method = _weight(row)[:, 2 * row.block :], row.at(tiny.SIGMAS)

  def loss(context, noisy):
    x0 = exit_step.teacher_forcing(tiny.bind(network), context, 0.5, noisy, 0.8, method)
    return jnp.sum(x0[:, 2 * row.block :] * weight)

  return quick_jit(jax.grad(loss, argnums=(0, 1)))(tiny.video(1, 6), tiny.video(2, 6))


@pytest.mark.parametrize("network", few(tiny.NETWORKS, "toy"))
def test_detached_context_receives_exactly_no_gradient(network):
  context, noisy = _sensitivity(network, MethodConfig(block=2, window=0))
  assert not np.asarray(context).any()
  assert not np.asarray(noisy)[:, :4].any() and np.asarray(noisy)[:, 4:].any()


def test_attached_context_receives_gradient_from_its_successors_alone():
  context, noisy = _sensitivity("toy", MethodConfig(block=2, window=0, gradient="attached"))
  assert np.asarray(context)[:, :2].any() and np.asarray(context)[:, 2:4].any()
  assert not np.asarray(context)[:, 4:].any()
  assert not np.asarray(noisy)[:, :4].any()


@pytest.mark.parametrize(
  ("network", "per_frame"), [("toy", False), ("toy", True), *slow(("dit", True))]
)
def test_teacher_forcing_equals_one_forward_over_context_and_noisy(network, per_frame):
  row = MethodConfig(block=2, window=5, sink=1, gradient="attached")
  context, noisy, weight = (tiny.video(seed, 6) for seed in (1, 2, 3))
  levels = np.linspace(0.2, 0.9, tiny.BATCH * 6, dtype=np.float32).reshape(tiny.BATCH, 6)
  context_sigma, sigma = (
    (levels[::-1], levels) if per_frame else (np.full_like(levels, 0.3), np.full_like(levels, 0.8))
  )
  positions = jnp.arange(6, dtype=jnp.int32)
  causal = np.asarray([[sees(q, p, row) for p in range(6)] for q in range(6)])
  own = np.asarray([[q // row.block == p // row.block for p in range(6)] for q in range(6)])
  mask = np.block([[causal, np.zeros_like(causal)], [causal & ~own, own]])
  short = (lambda level: level) if per_frame else (lambda level: level[0, 0])

  def two(params):
    bound, method = tiny.bind(network, params), row.at(tiny.SIGMAS)
    x0 = exit_step.teacher_forcing(
      bound, context, short(context_sigma), noisy, short(sigma), method
    )
    return jnp.sum(x0 * weight), x0

  def one(params):
    both, both_sigma = (
      np.concatenate([context, noisy], axis=1),
      np.concatenate([context_sigma, sigma], axis=1),
    )
    forward = (
      tiny.toy_forward(params)
      if network == "toy"
      else masked.bind(tiny.CONFIG, params, tiny.text())
    )
    v, _ = forward(both, both_sigma, jnp.concatenate([positions, positions]), mask=mask)
    x0 = noisy - sigma[..., None, None, None] * v[:, 6:]
    return jnp.sum(x0 * weight), x0

  params = tiny.NETWORKS[network][1]
  a, b = (quick_jit(jax.grad(form, has_aux=True))(params) for form in (two, one))
  assert_same_tree(a, b)


def test_a_clean_sink_is_trained_at_the_input_level_alone():
  row = ROWS["hiar_clean_sink"]
  with pytest.raises(
    UserError, match="'clean' is trained at history.level = 'input' alone, not at 'output'"
  ):
    program(row)(_noise(row), 0, _weight(row))
