"""The hard cases of the pipeline: levels that fill, sinks that move, texts that change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import method as methods
from hiar_jax.models import dit
from hiar_jax.rollout import pipeline
from hiar_jax.rollout import tick as pipes
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.seams import ticks
from tests.seams.cases import ROWS, assert_close, bound, method_of, noise_of, shape


def given_blocks(row, given) -> int:
  return 0 if given is None else -(-given.shape[1] // row.block)


# ----------------------------------------------------------------- 2: filling ticks, under a vmap


def stream(state, count: int, first: int, levels: int, text, changes, tick, recache):
  """Ticks `count` times; returns (blocks that left, the state). changes: blocks that recache."""
  left = []
  for n in range(first, first + count):
    due = np.asarray([n - level in changes for level in range(levels)])
    if due.any():
      state = recache(state, text(n), due)
    state, block = tick(state, text(n), np.asarray(n in changes))
    left.append(block)
  return np.stack(left), state


def old_stream(row, count: int, text, *, given=None, sink_positions="absolute", changes=()):
  """Today's pipeline: (blocks that left, the frames that slots hold at the end)."""
  plan = pipeline.PipelineMethod(row, tuple(map(float, tiny.SIGMAS)), sink_positions)
  first = given_blocks(row, given)
  noise, params = noise_of(row, count + first + 1), tiny.params()

  def network(text):
    return dit.bind(tiny.CONFIG, params, text)

  state = pipes.empty(
    plan,
    tiny.CONFIG,
    text(0),
    jax.random.key(0),
    jnp.zeros(tiny.BATCH, jnp.int32),
    frames=(count + first) * row.block,
    height=tiny.HEIGHT,
    width=tiny.WIDTH,
  )
  if given is not None:
    texts = jnp.stack([text(0)] * first)
    state = quick_jit(lambda s: pipes.prefill(plan, network, s, given, texts))(state)
  tick = quick_jit(lambda s, text, flag: pipes.tick(plan, network, noise, s, text, flag))
  recache = quick_jit(lambda s, text, due: pipes.recache(plan, network, s, text, due))
  left, state = stream(state, count, first, plan.levels, text, changes, tick, recache)
  return left, state.cache.position


def new_stream(row, count: int, text, *, given=None, sink_positions="absolute", changes=()):
  """The same with the new nouns."""
  method, first = method_of(row, sink_positions), given_blocks(row, given)
  noise, b = noise_of(row, count + first + 1), bound(text(0))
  state = ticks.empty(b, method, shape((count + first) * row.block))
  if given is not None:
    texts = jnp.stack([text(0)] * first)
    state = quick_jit(lambda s: ticks.prefill(b, s, given, texts))(state)
  tick = quick_jit(
    lambda s, text, flag: ticks.tick(b, noise, method, s, ticks.Entering(text, flag))
  )
  recache = quick_jit(lambda s, text, due: ticks.recache(b, method, s, ticks.Entering(text), due))
  left, state = stream(state, count, first, method.levels, text, changes, tick, recache)
  return left, state.past.positions


def one_text(n):
  return tiny.text()


def two_texts(n):
  """A prompt that changes at block 3."""
  return tiny.text() if n < 3 else tiny.text()[::-1]


@pytest.mark.parametrize(
  "name", ["window inside blocks", "sink across blocks", "no past", "input", "euler"]
)
def test_2_filling_ticks(name):
  """Levels that have no block yet are vmapped with those that have."""
  row = ROWS[name]
  new, old = new_stream(row, 7, one_text), old_stream(row, 7, one_text)
  assert_close(new[0][2:], old[0][2:])
  np.testing.assert_array_equal(new[1], old[1])


# ------------------------------------------------------------------------------ 4: a relative sink


@pytest.mark.parametrize("level", ["output", "input"])
def test_4_a_relative_sink(level):
  """Two copies of the sink, each rotated for one of the two groups that read it."""
  row = methods.Method(window=8, sink=2, level=level)
  new, old = (run(row, 9, one_text, sink_positions="relative") for run in (new_stream, old_stream))
  assert_close(new[0][2:], old[0][2:])
  still = new_stream(row, 9, one_text)
  assert np.abs(still[0] - new[0]).max() > 1e-2  # and it moves


# ------------------------------------------------------------------------------ 5: given frames


@pytest.mark.parametrize(
  ("given", "level"), [(1, "output"), (3, "output"), (6, "output"), (3, "input")]
)
def test_5_a_stream_from_given_frames(given, level):
  row = methods.Method(window=8, sink=2, level=level)
  new, old = (run(row, 6, one_text, given=tiny.video(8, given)) for run in (new_stream, old_stream))
  assert_close(new[0][2:], old[0][2:])
  np.testing.assert_array_equal(new[1], old[1])


# ------------------------------------------------------------------- 6: two texts in one forward


@pytest.mark.parametrize("name", ["window inside blocks", "input"])
def test_6_two_texts_in_one_forward(name):
  """The prompt changes: a context still hears its own block's text beside the new one."""
  row = ROWS[name]
  new, old = new_stream(row, 8, two_texts), old_stream(row, 8, two_texts)
  assert_close(new[0][2:], old[0][2:])
  assert np.abs(new[0] - new_stream(row, 8, one_text)[0])[3:].max() > 1e-2


# ------------------------------------------------------------------- 9: recache at a prompt change


@pytest.mark.parametrize(
  ("row", "given"),
  [
    (methods.Method(window=7, sink=2), 1),
    (methods.Method(window=9), 3),
    (methods.Method(window=8, sink=1, level="input"), 0),
  ],
)
def test_9_recache_after_a_change_of_prompt(row, given):
  given = tiny.video(8, given) if given else None
  new, old = (run(row, 8, two_texts, given=given, changes=(3,)) for run in (new_stream, old_stream))
  assert_close(new[0][2:], old[0][2:])
  kept = new_stream(row, 8, two_texts, given=given)
  assert np.abs(kept[0] - new[0]).max() > 1e-3
