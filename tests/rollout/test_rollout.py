"""Rollouts: fused, separate and plain loops agree; no block reaches an earlier one; windows hold
for long videos.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Frames, Out, bind
from hiar_jax.rollout import sample, step_first, teacher_sampler
from hiar_jax.rollout.past.ring import Ring
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.plain_rollout import ROWS, Plain, assert_same
from tests.helpers.slow_cases import few

BLOCKS = 4
# One of each loop with the true network; the toy goes through all rows.
DIT_ROWS = ("hiar_sink", "self_aligned", "self_forcing_window")
CASES = [("toy", name) for name in ROWS] + [("dit", name) for name in DIT_ROWS]


def can_be_fused(row: MethodConfig) -> bool:
  return row.order == "step_first" and row.level != "input"


QUICK = [case for case in CASES if case[0] == "toy" or case[1] == DIT_ROWS[0]]
each_case = pytest.mark.parametrize(("network", "name"), few(CASES, *QUICK))


@functools.cache
def program(network: str, row: MethodConfig, fused: bool = True, given: int = 0):
  """(table, given video or None) -> video, compiled; the table counts the given blocks."""
  orders = {"step_first": functools.partial(step_first.generate, fused=fused)}

  def run(params, table, given_video):
    shape = tiny.shape((table.shape[1] - given) * row.block)
    with mock.patch.dict(sample.ORDERS, orders):  # while it is traced
      bound, method = tiny.bind(network, params), row.at(tiny.SIGMAS)
      return sample.rollout(bound, tiny.lookup(table), method, shape, given_video)

  return functools.partial(quick_jit(run), tiny.NETWORKS[network][1])


def plain(network, row, table, given=None) -> np.ndarray:
  blocks = table.shape[1]
  return np.concatenate(
    Plain(network, row, blocks * row.block, table).rollout(blocks, given), axis=1
  )


@each_case
def test_equals_plain_loops(network, name):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  assert_same(program(network, row)(table, None), plain(network, row, table))


FUSED = [case for case in CASES if can_be_fused(ROWS[case[1]])]


@pytest.mark.parametrize(
  ("network", "name"),
  few(FUSED, *(case for case in FUSED if case[0] == "toy")),
)
def test_separate_forwards_equal_fused_ones(network, name):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  assert_same(program(network, row, False)(table, None), program(network, row)(table, None))


@pytest.mark.parametrize(
  ("name", "given", "fused"),
  [
    ("hiar_sink", 1, False),
    ("hiar_sink", 2, True),
    ("hiar_sink_across_blocks", 1, True),
    ("self_aligned", 2, True),
    ("self_forcing_window", 1, True),
    ("self_forcing_window", 2, True),
    ("clean", 3, False),
  ],
)
def test_continuation_equals_plain_loops(name, given, fused):
  row = ROWS[name]
  table, video = tiny.noise_table(row, BLOCKS), tiny.video(5, given * row.block)
  out = program("toy", row, fused, given)(table, video)
  np.testing.assert_array_equal(out[:, : given * row.block], video)
  assert_same(out, plain("toy", row, table, np.split(video, given, axis=1)))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
  "name", ["hiar", "self_aligned", "self_aligned_euler", "self_forcing_window"]
)
def test_videos_shorter_than_the_window(name, blocks):
  row = ROWS[name]
  table = tiny.noise_table(row, blocks)
  assert_same(program("toy", row)(table, None), plain("toy", row, table))


@pytest.mark.parametrize(
  "row",
  [
    MethodConfig(block=2, window=5, sink=1),
    MethodConfig(block=3, window=7, sink=2),
    MethodConfig(block=3, window=10, sink=4, level="input"),
    MethodConfig(block=2, window=5, sink=1, order="block_first", level="clean"),
  ],
  ids=lambda row: f"{row.order}_{row.level}_block{row.block}_window{row.window}_sink{row.sink}",
)
def test_a_long_video_through_a_small_cache_equals_full_masks(row):
  """The ring turns many times; the plain loops keep everything and mask it."""
  table = tiny.noise_table(row, 12)
  assert empty_ring(row, 12 * row.block).slots < 3 * row.block
  assert_same(program("toy", row)(table, None), plain("toy", row, table))


@pytest.mark.parametrize("changed", [1, 2, 3])
@each_case
def test_a_later_block_changes_no_earlier_output(network, name, changed):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  other = table.copy()
  other[:, changed:] = tiny.noise_table(row, BLOCKS, seed=8)[:, changed:]
  a, b = (np.asarray(program(network, row)(each, None)) for each in (table, other))
  end = changed * row.block
  np.testing.assert_array_equal(a[:, :end], b[:, :end])
  assert (a[:, end : end + row.block] != b[:, end : end + row.block]).any()


@each_case
def test_an_earlier_block_changes_later_outputs(network, name):
  """Otherwise causality above would hold for blocks that see nothing."""
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  other = table.copy()
  other[:, 0] = tiny.noise_table(row, BLOCKS, seed=8)[:, 0]
  a, b = (np.asarray(program(network, row)(each, None)) for each in (table, other))
  assert np.abs(a - b)[:, row.block : 2 * row.block].max() > 1e-4


# -- the cache


def empty_ring(row: MethodConfig, frames: int) -> Ring:
  return Ring.empty(tiny.CONFIG, row.at(tiny.SIGMAS), tiny.shape(frames), tiny.BATCH)


@pytest.mark.parametrize(
  ("block", "window", "sink"),
  [
    (1, 1, 0),
    (1, 2, 1),
    (1, 5, 2),
    (2, 3, 0),
    (2, 5, 1),
    (2, 7, 5),
    (3, 5, 1),
    (3, 6, 0),
    (3, 6, 1),
    (3, 7, 1),
    (3, 7, 4),
    (3, 8, 5),
    (3, 11, 2),
    (3, 12, 3),
  ],
)
def test_the_cache_holds_what_the_next_block_sees(block, window, sink):
  row = MethodConfig(block=block, window=window, sink=sink)
  past = empty_ring(row, 10**6)
  position = np.full(row.past_frames(10**6), -1)
  assert position.size == window - block
  for n in range(12):
    frames = np.arange(n * block, n * block + block)
    visible = {p for p in range(n * block) if p < sink or p > frames[-1] - (window - sink)}
    assert visible <= set(position.tolist())
    assert [p for p in range(sink) if p < n * block] == [
      p for p in sorted(position) if 0 <= p < sink
    ]
    if not position.size:
      continue
    slots = np.asarray(past.slots_of(jnp.asarray(frames)))
    kept = slots < position.size
    assert len(set(slots[kept])) == kept.sum()
    position[slots[kept]] = frames[kept]


def test_a_cache_does_not_grow_with_the_video():
  row = MethodConfig(block=3, window=21)
  past = empty_ring(row, 30)
  assert past.slots == past.kv.k.shape[2] == 18 and past.latents is None
  assert row.past_frames(10**6) == 18 and row.past_frames(9) == 6 and row.past_frames(3) == 0
  assert MethodConfig(block=3, window=0).past_frames(30) == 27


def test_writing_keeps_what_it_does_not_replace():
  row = MethodConfig(block=2, window=5, sink=1)
  before = empty_ring(row, 20)
  before = before.replace(
    kv=jax.tree.map(lambda leaf: leaf + 7, before.kv), positions=jnp.asarray([0, 2, 1], jnp.int32)
  )
  new = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + 1, before.kv.take(0, 2))
  after = before.write(new, Frames(tiny.video(0, 2), 0.0, jnp.asarray([3, 4])))
  assert sorted(after.positions.tolist()) == [0, 3, 4]
  np.testing.assert_array_equal(after.kv.k[:, :, 0], before.kv.k[:, :, 0])
  assert (np.asarray(after.kv.v[:, :, 1:]) == 1).all()


# -- the teacher's sampler


class WholeClips:
  """A Network of one group of all frames, whose velocity is a function of x and sigma."""

  def __init__(self, velocity):
    self.velocity = velocity

  def apply(self, params, groups, texts, past=(), start=None) -> Out:
    (group,) = groups
    assert not group.reads and not past and group.positions.shape == group.x.shape[1:2]
    return Out((self.velocity(group.x, group.sigma),), (None,))


def whole_clips(velocity):
  return bind(WholeClips(velocity), {}, tiny.text())


def test_bidirectional_trajectory_is_euler_with_guidance():
  eps, sigmas, keep = tiny.video(3, 2), np.asarray([1.0, 0.7, 0.3, 0.0], np.float32), (0, 2, 3)
  forward = whole_clips(lambda x, sigma: 0.3 * x + sigma)
  negative = whole_clips(lambda x, sigma: -0.2 * x)
  points = teacher_sampler.sample_trajectory(
    forward, negative, jnp.asarray(eps), jnp.asarray(sigmas), keep, 1.5
  )
  x, expected = eps.astype(np.float64), [eps]
  for sigma, lower in zip(sigmas[:-1], sigmas[1:], strict=True):
    v, w = 0.3 * x + sigma, -0.2 * x
    x = x + (lower - sigma) * (v + 1.5 * (v - w))
    expected.append(x)
  np.testing.assert_allclose(
    points, np.stack([expected[i] for i in keep], axis=1), rtol=1e-5, atol=1e-5
  )


def test_bidirectional_trajectory_without_guidance_needs_no_negative():
  negative = whole_clips(lambda *_: pytest.fail("called"))
  forward = whole_clips(lambda x, sigma: 0.3 * x)
  points = teacher_sampler.sample_trajectory(
    forward, negative, jnp.ones((1, 1, 1, 1, 1)), jnp.asarray([1.0, 0.0]), (1,), 0.0
  )
  np.testing.assert_allclose(points.ravel(), 0.7, rtol=1e-6)
