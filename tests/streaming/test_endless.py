"""A stream without end: constant memory, and at any block the numbers of a window freshly built."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers import tiny
from tests.helpers.plain_stream import PlainStream
from tests.helpers.small_heap import small_heap  # noqa: F401
from tests.helpers.tiny_stream import CONFIG, SIGMAS, assert_same, parts, quick_engine, take, text

ROWS = {
  "window": MethodConfig(block=2, window=6, renoise="euler"),
  "carried": MethodConfig(block=2, window=7, sink=2, renoise="euler"),
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
REACH = 2 * 4  # blocks that a block's numbers depend on: a window for each of two layers
FAR = 300_000_000  # blocks: at 4 latent frames a second, 4 years


@functools.cache
def engine(row: MethodConfig):
  return quick_engine(
    parts(row), TickOptions(layout=Layout(), sink_positions="relative" if row.sink else "absolute")
  )


def jump(generation: LiveVideo, blocks: int) -> None:
  """To a block far on, with nothing of what was there but the sink."""
  pipe = generation._pipe
  at = lambda: jnp.asarray(blocks, jnp.int32)
  generation._pipe = pipe.replace(block=at(), first=at())
  generation._block = generation._first = blocks


def sink_of(generation: LiveVideo) -> np.ndarray:
  """[s b k h w c]: block 0 as each level has shown it, once the ring has turned."""
  return np.asarray(generation._pipe.past.latents[:, :, : generation.engine.method.sink])


def watch(generation: LiveVideo, ticks: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """(what each level shows next, what it denoises next) before each tick, and after the last."""
  look = lambda: (np.asarray(generation._pipe.context), np.asarray(generation._pipe.latents))
  seen = [look()]
  for _ in range(ticks):
    generation.step()
    seen.append(look())
  return seen


def assert_as_freshly_built(row: MethodConfig, seen, sink: np.ndarray) -> None:
  """The last tick again, level by level: a window built from frame 0 on of what the ticks before it
  have shown, then one step.
  """
  for level in range(1, len(SIGMAS) - 1):  # what level 0 denoises enters within the tick
    sigma, lower = SIGMAS[level], SIGMAS[level + 1]
    contexts = [sink[level]] * bool(row.sink) + [context[level] for context, _ in seen[:-1]]
    fresh = PlainStream(
      CONFIG,
      tiny.params(CONFIG),
      row,
      SIGMAS,
      REACH + 4,
      texts=None,
      noise=None,
      carried=row.sink > 0,
    )
    past = {}
    for n, latents in enumerate(contexts):
      past.update(fresh.forward(past, n, latents, lower, text("a")[None])[1])
    x = seen[-2][1][level]
    v, _ = fresh.forward(past, len(contexts), x, sigma, text("a")[None])
    after = seen[-1][1][(level + 1) % (len(SIGMAS) - 1)]
    assert_same(after, x + np.float32(lower - sigma) * v)


@each_row
@pytest.mark.slow
@pytest.mark.parametrize("block", [20, FAR])
def test_far_on_numbers_are_those_of_a_fresh_window(row, block):
  generation = LiveVideo(engine(row), "a", seed=6)
  take(generation, 6)
  sink = sink_of(generation)
  jump(generation, block)
  seen = watch(generation, REACH + 4)
  assert_as_freshly_built(row, seen[-REACH - 2 :], sink)


def live_bytes() -> int:
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


def run_long(row: MethodConfig, blocks: int) -> None:
  generation = LiveVideo(engine(row), "a", seed=6)
  take(generation, 20)
  sink, before, sizes = sink_of(generation), live_bytes(), []
  for _ in range(blocks // 100):
    for _ in range(99):
      emitted = generation.step()
    assert np.isfinite(emitted.latents).all() and np.abs(emitted.latents).max() < 100
    emitted = generation.step()
    sizes.append(live_bytes() - emitted.latents.nbytes)
    assert len(generation._prompts) < 5
  assert set(sizes) == {sizes[0]} and sizes[0] <= before + 1000
  seen = watch(generation, REACH + 4)
  assert_as_freshly_built(row, seen[-REACH - 2 :], sink)


@pytest.mark.usefixtures("small_heap")
@each_row
def test_three_hundred_blocks(row):
  run_long(row, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
@each_row
def test_ten_thousand_blocks(row):
  run_long(row, 10_000)
