"""A past that keeps every other block, written as a fork would: a subclass of Ring and a name.

Through whole videos, the stream and training's exit step, against loops that keep nothing: one
forward over everything that may be seen.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import bind
from hiar_jax.rollout import exit_step, sample
from hiar_jax.rollout import tick as ticks
from hiar_jax.rollout.past import kinds
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import visible
from tests.helpers import plain_rollout, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few

BLOCKS = 6


@flax.struct.dataclass
class EveryOther(Ring):
  """The even blocks of the window."""

  @staticmethod
  def visible(method, query, key):
    return visible(method, query, key) & (key // method.block % 2 == 0)

  @staticmethod
  def capacity(method, frames):
    k = method.block
    return -(-method.past_frames(frames) // (2 * k)) * k + k * (frames > k)

  def slots_of(self, positions):
    k = self.method.block
    number = positions // k
    inside = number // 2 * k + positions % k
    return jnp.where(number % 2 == 0, inside % max(self.slots, 1), self.slots)

  def blocks_before(self, n):
    held = self.slots // self.method.block
    last = (n - 1) // 2 * 2  # the last even block before n, which may not be written yet
    order = last + 2 * (jnp.arange(held + 1) - held)
    return order, order >= 0


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(kinds.PASTS, "every other", EveryOther)
  seen = lambda q, p, row: sees(q, p, row) and p // row.block in (0, 2, 4, q // row.block)
  monkeypatch.setattr(plain_rollout, "sees", seen)


sees = plain_rollout.sees
WALKED = "hiar", "hiar_window", "euler", "clean", "input", "self_forcing", "self_forcing_window"
ROWS = {
  name: dataclasses.replace(plain_rollout.ROWS[name], past="every other", sink=0) for name in WALKED
}


def whole_video(row: MethodConfig, table) -> np.ndarray:
  method, frames = row.at(tiny.SIGMAS), BLOCKS * row.block
  run = quick_jit(lambda b: sample.rollout(b, tiny.lookup(table), method, tiny.shape(frames)))
  return np.asarray(run(bound()))


def bound():
  return bind(tiny.Toy(), tiny.TOY_PARAMS, tiny.text())


def plain(row: MethodConfig, table, stop=None) -> np.ndarray:
  walk = plain_rollout.Plain("toy", row, BLOCKS * row.block, table)
  return np.concatenate(walk.rollout(BLOCKS, stop=stop), axis=1)


@pytest.mark.parametrize("name", ROWS)
def test_whole_videos(name):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  video = whole_video(row, table)
  plain_rollout.assert_same(video, plain(row, table))
  usual = dataclasses.replace(row, past="ring")
  assert np.abs(video - whole_video(usual, table)).max() > 1e-3


def test_it_keeps_half_as_much():
  row = MethodConfig(block=2, window=18)
  kept, usual = (
    kinds.kind(r).empty(tiny.Toy(), r.at(tiny.SIGMAS), tiny.shape(40), 1)
    for r in (dataclasses.replace(row, past="every other"), row)
  )
  assert isinstance(kept, EveryOther) and (kept.slots, usual.slots) == (10, 16)


@pytest.mark.parametrize("name", ["hiar_window", "euler", "input"])
def test_a_stream(name):
  row = ROWS[name]
  method, table = row.at(tiny.SIGMAS), tiny.noise_table(row, BLOCKS + 4)
  b, noise = bound(), tiny.lookup(table)
  state = ticks.empty(
    b, method, tiny.shape(BLOCKS * row.block), jax.random.key(0), jnp.zeros(tiny.BATCH, jnp.int32)
  )
  tick = quick_jit(lambda state: ticks.tick(b, noise, state, tiny.text(), False))
  blocks = []
  for _ in range(BLOCKS + method.levels - 1):
    state, block = tick(state)
    blocks.append(np.asarray(block))
  streamed = np.concatenate(blocks[method.levels - 1 :], axis=1)
  plain_rollout.assert_same(streamed, plain(row, table))


def test_encoding_it_again_changes_nothing_under_the_same_text():
  row = ROWS["hiar_window"]
  method, table = row.at(tiny.SIGMAS), tiny.noise_table(row, BLOCKS + 4)
  b, noise, text = bound(), tiny.lookup(table), tiny.text()
  state = ticks.empty(
    b, method, tiny.shape(BLOCKS * row.block), jax.random.key(0), jnp.zeros(tiny.BATCH, jnp.int32)
  )
  tick = quick_jit(lambda state: ticks.tick(b, noise, state, text, False)[0])
  for _ in range(BLOCKS + 1):
    state = tick(state)
  again = quick_jit(lambda s: ticks.recache(b, s, text, jnp.ones(method.levels, bool)))(state)
  held = np.asarray(state.past.positions[0]) >= 0
  assert held.any()
  for new, old in zip(jax.tree.leaves(again.past.kv), jax.tree.leaves(state.past.kv), strict=True):
    np.testing.assert_allclose(new, old, rtol=0, atol=2e-5 * np.abs(old).max())


EXITS = [
  (name, level)
  for name in ("hiar_window", "clean", "input", "self_forcing_window")
  for level in range(tiny.SIGMAS.size - 1)
]
QUICK = [
  (name, level) for name, level in EXITS if not level or name not in ("hiar_window", "clean")
]


@pytest.mark.parametrize(("name", "level"), few(EXITS, *QUICK))
def test_the_exit_step(name, level):
  """Its parallel forwards see what the loop saw, at every level."""
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  arguments = (
    bound(),
    tiny.lookup(table),
    row.at(tiny.SIGMAS),
    tiny.shape(BLOCKS * row.block),
    level,
  )
  expected = plain(row, table, level)
  plain_rollout.assert_same(quick_jit(lambda: exit_step.self_rollout(*arguments))(), expected)
  values = quick_jit(lambda: exit_step.self_rollout_without_gradient(*arguments))()
  plain_rollout.assert_same(values, expected)
