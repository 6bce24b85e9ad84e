"""The hard cases of the pipeline: levels that fill, sinks that move, texts that change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.rollout import tick as ticks
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import slow
from tests.seams.cases import ROWS, assert_close, bound, method_of, noise_of, recorded, shape


def stream(row, count: int, text, *, given=None, sink_positions="absolute", changes=()):
  """Ticks `count` times: (blocks that left, the frames that slots hold at the end).

  text(n): of block n. changes: blocks before which the past is encoded again.
  """
  method, first = method_of(row, sink_positions), 0
  if given is not None:
    first = -(-given.shape[1] // row.block)
  noise, b = noise_of(row, count + first + 1), bound(text(0))
  seeds = jnp.zeros(tiny.BATCH, jnp.int32)
  state = ticks.empty(b, method, shape((count + first) * row.block), jax.random.key(0), seeds)
  if given is not None:
    texts = jnp.stack([text(0)] * first)
    state = quick_jit(lambda s: ticks.prefill(b, s, given, texts))(state)
  tick = quick_jit(lambda s, text, flag: ticks.tick(b, noise, s, text, flag))
  recache = quick_jit(lambda s, text, due: ticks.recache(b, s, text, due))
  left = []
  for n in range(first, first + count):
    due = np.asarray([n - level in changes for level in range(method.levels)])
    if due.any():
      state = recache(state, text(n), due)
    state, block = tick(state, text(n), np.asarray(n in changes))
    left.append(block)
  return np.stack(left), state.past.positions


def assert_recorded(streamed, name: str):
  left, slots = streamed
  assert_close(left[2:], f"stream {name}")
  np.testing.assert_array_equal(slots, recorded()[f"slots {name}"])


def one_text(n):
  return tiny.text()


def two_texts(n):
  """A prompt that changes at block 3."""
  return tiny.text() if n < 3 else tiny.text()[::-1]


@pytest.mark.parametrize(
  "name", ["sink across blocks", "input", *slow("window inside blocks", "no past", "euler")]
)
def test_2_filling_ticks(name):
  """Levels that have no block yet are vmapped with those that have."""
  row = ROWS[name]
  assert_recorded(stream(row, 7, one_text), f"filling {name}")


# ------------------------------------------------------------------------------ 4: a relative sink


@pytest.mark.slow
@pytest.mark.parametrize("level", ["output", "input"])
def test_4_a_relative_sink(level):
  """Two copies of the sink, each rotated for one of the two groups that read it."""
  row = MethodConfig(window=8, sink=2, level=level)
  moved = stream(row, 9, one_text, sink_positions="relative")
  assert_recorded(moved, f"relative sink {level}")
  still = stream(row, 9, one_text)
  assert np.abs(still[0] - moved[0]).max() > 1e-2


# ------------------------------------------------------------------------------ 5: given frames


@pytest.mark.slow
@pytest.mark.parametrize(
  ("given", "level"), [(1, "output"), (3, "output"), (6, "output"), (3, "input")]
)
def test_5_a_stream_from_given_frames(given, level):
  row = MethodConfig(window=8, sink=2, level=level)
  streamed = stream(row, 6, one_text, given=tiny.video(8, given))
  assert_recorded(streamed, f"given {given} {level}")


# ------------------------------------------------------------------- 6: two texts in one forward


@pytest.mark.parametrize("name", ["input", *slow("window inside blocks")])
def test_6_two_texts_in_one_forward(name):
  """The prompt changes: a context still hears its own block's text beside the new one."""
  row = ROWS[name]
  changed = stream(row, 8, two_texts)
  assert_recorded(changed, f"two texts {name}")
  assert np.abs(changed[0] - stream(row, 8, one_text)[0])[3:].max() > 1e-2


# ------------------------------------------------------------------- 9: recache at a prompt change


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "row", "given"),
  [
    (0, MethodConfig(window=7, sink=2), 1),
    (1, MethodConfig(window=9), 3),
    (2, MethodConfig(window=8, sink=1, level="input"), 0),
  ],
)
def test_9_recache_after_a_change_of_prompt(case, row, given):
  given = tiny.video(8, given) if given else None
  new = stream(row, 8, two_texts, given=given, changes=(3,))
  assert_recorded(new, f"recache {case}")
  kept = stream(row, 8, two_texts, given=given)
  assert np.abs(kept[0] - new[0]).max() > 1e-3
