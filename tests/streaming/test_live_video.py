"""A generation: prompts that change, windows, sinks, starts, and what it says of itself, against
plain loops that switch texts by block.
"""

import dataclasses
import functools

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.streaming import layout as layouts
from hiar_jax.streaming.compiled_tick import Engine, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers import tiny
from tests.helpers.slow_cases import slow
from tests.helpers.tiny_stream import (
  CONFIG,
  ROW,
  SAF,
  SIZE,
  assert_same,
  parts,
  plain,
  quick_engine,
  take,
)

ONE = Layout()
LEVELS = 4


@functools.cache
def engine(row: MethodConfig = ROW, **options) -> Engine:
  return quick_engine(parts(row), TickOptions(layout=ONE, **options))


def start(frames: int) -> np.ndarray:
  return tiny.random(5, 1, frames, *SIZE, CONFIG.channels)


def test_equals_plain_loops_and_numbers_its_blocks():
  generation = LiveVideo(engine(), "a red circle", seed=3)
  emitted = [generation.step() for _ in range(6 + LEVELS - 1)]
  assert emitted[: LEVELS - 1] == [None] * (LEVELS - 1)
  found = emitted[LEVELS - 1 :]
  assert [e.block for e in found] == list(range(6))
  assert_same(
    np.concatenate([e.latents for e in found], axis=1), plain(ROW, 6, {0: "a red circle"}, seed=3)
  )


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize(
  ("row", "options"),
  [
    (ROW, {}),
    (ROW, {"sink_positions": "relative"}),
    *slow(
      (MethodConfig(block=2, window=7, sink=1, level="input"), {}),
      (MethodConfig(block=2, window=7, sink=1, level="fixed:0.3"), {}),
      (MethodConfig(block=2, window=4), {"window": 7, "sink": 2, "sink_positions": "relative"}),
    ),
  ],
  ids=["output", "carried", "input", "fixed", "options"],
)
def test_prompts_change_at_block_boundaries(row, options, recache):
  generation = LiveVideo(engine(row, **options), "a red circle", seed=1)
  first = take(generation, 2)
  entered = generation.change_prompt("a blue square", recache=recache)
  assert entered == generation.next_block == 2 + LEVELS - 1
  rest = take(generation, 2)
  later = generation.change_prompt("a red circle", recache=recache)
  rest = np.concatenate([first, rest, take(generation, 7)], axis=1)
  method = engine(row, **options).method
  prompts, recache = (
    {0: "a red circle", entered: "a blue square", later: "a red circle"},
    {entered, later} if recache else set(),
  )
  assert_same(
    rest, plain(method, 11, prompts, seed=1, recache=frozenset(recache), carried=method.moves_sink)
  )
  assert (
    np.abs(rest - plain(method, 11, {0: "a red circle"}, seed=1, carried=method.moves_sink)).max()
    > 1e-2
  )


def test_a_change_leaves_what_is_in_flight():
  same, changed = (LiveVideo(engine(), "a red circle", seed=2) for _ in range(2))
  a, b = take(same, 2), take(changed, 2)
  entered = changed.change_prompt("a blue square", recache=True)
  flight = [(1, 4, "a red circle"), (2, 3, "a red circle"), (3, 2, "a red circle")]
  assert changed.in_flight == flight and entered == 5
  a, b = np.concatenate([a, take(same, 4)], axis=1), np.concatenate([b, take(changed, 4)], axis=1)
  np.testing.assert_array_equal(a[:, : entered * ROW.block], b[:, : entered * ROW.block])
  assert (a[:, entered * ROW.block :] != b[:, entered * ROW.block :]).any()
  assert changed.in_flight[0] == (1, 8, "a blue square")


def test_the_last_change_before_a_step_holds():
  generation = LiveVideo(engine(), "a red circle", seed=2)
  generation.change_prompt("a blue square")
  generation.change_prompt("a green ring", recache=True)  # nothing is there to encode again
  assert_same(take(generation, 3), plain(ROW, 3, {0: "a green ring"}, seed=2))


@pytest.mark.parametrize("blocks", [1, 4])
def test_starts_from_given_frames(blocks):
  given = start(blocks * ROW.block)
  generation = LiveVideo(engine(), "a red circle", seed=2, start=given)
  emitted = None
  while emitted is None:
    emitted = generation.step()
  assert emitted.block == blocks
  entered = generation.change_prompt("a blue square", recache=True)
  video = np.concatenate([given, emitted.latents, take(generation, 6)], axis=1)
  prompts = {0: "a red circle", entered: "a blue square"}
  assert_same(
    video,
    plain(
      ROW,
      blocks + 7,
      prompts,
      seed=2,
      given=np.split(given, blocks, axis=1),
      recache=frozenset({entered}),
    ),
  )


def test_starts_from_a_picture():
  generation = LiveVideo(engine(), "a red circle", seed=2, start=start(1))
  other = LiveVideo(engine(), "a red circle", seed=2)
  emitted = [generation.step() for _ in range(LEVELS)][-1]
  assert emitted.block == 1
  assert np.abs(np.asarray(emitted.latents) - take(other, 2)[:, -ROW.block :]).max() > 1e-2


def test_a_clean_sink_is_made_first():
  """SAF: the sink's blocks leave before the others enter, which see them clean."""
  generation = LiveVideo(engine(SAF), "a red circle", seed=4)
  emitted = [generation.step() for _ in range(LEVELS + LEVELS + 4)]
  assert [i for i, e in enumerate(emitted) if e] == [
    LEVELS - 1,
    *range(2 * LEVELS - 1, 2 * LEVELS + 4),
  ]
  assert [e.block for e in emitted if e] == list(range(6))
  found = np.concatenate([e.latents for e in emitted if e], axis=1)
  head = plain(dataclasses.replace(SAF, sink_level="history"), 1, {0: "a red circle"}, seed=4)
  assert_same(found, plain(SAF, 6, {0: "a red circle"}, seed=4, given=[head]))


@pytest.mark.parametrize(
  ("ticks", "recache", "entered"),
  [*slow((1, False, 1)), (2, False, 2), (3, True, 2), (4, False, 2), (5, True, 2), (6, True, 3)],
)
def test_prompts_change_while_a_clean_sink_is_made(ticks, recache, entered):
  """A sink of two blocks: they have left after 5 ticks, and what follows enters only then."""
  row = dataclasses.replace(SAF, sink=4, window=8)
  generation = LiveVideo(engine(row), "a red circle", seed=4)
  emitted = [generation.step() for _ in range(ticks)]
  assert (
    generation.next_block == entered == generation.change_prompt("a blue square", recache=recache)
  )
  found = [np.asarray(e.latents) for e in emitted if e]
  found = np.concatenate([*found, take(generation, 6 - len(found))], axis=1)
  prompts = {0: "a red circle", entered: "a blue square"}
  head = plain(dataclasses.replace(row, sink_level="history"), 2, prompts, seed=4)
  recache = frozenset({entered}) if recache else frozenset()
  assert_same(
    found, plain(row, 6, prompts, seed=4, given=np.split(head, 2, axis=1), recache=recache)
  )


def test_a_change_may_be_taken_back():
  """What was to be encoded again is not, when another change for the same block does not ask for
  it.
  """
  generation = LiveVideo(engine(), "a red circle", seed=2)
  first = take(generation, 2)
  generation.change_prompt("a blue square", recache=True)
  generation.change_prompt("a red circle")
  assert_same(
    np.concatenate([first, take(generation, 6)], axis=1), plain(ROW, 8, {0: "a red circle"}, seed=2)
  )


def test_the_pipes_memory_is_used_again():
  """A tick gives up the old pipe's arrays: two of them would be twice the caches."""
  generation = LiveVideo(engine(), "a", seed=2)
  generation.step()
  old = generation._pipe
  generation.step()
  assert old.latents.is_deleted() and old.past.kv.k.is_deleted() and old.past.kv.v.is_deleted()


def test_a_video_depends_on_its_prompt_and_seed():
  a, b, c, d = (
    take(LiveVideo(engine(), *of), 2) for of in (("a", 1), ("a", 1), ("b", 1), ("a", 2))
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 1e-2 and np.abs(a - d).max() > 1e-2


def test_a_warm_engine_compiles_nothing_in_the_midst_of_a_video():
  warm = engine()
  warm.warm("a")
  programs = (warm.main._start, warm.main.compiled_tick, warm.main._recache)
  before = [program._cache_size() for program in programs]
  generation = LiveVideo(warm, "a red circle", seed=1)
  take(generation, 2)
  generation.change_prompt("a blue square", recache=True)
  take(generation, 6)
  assert [program._cache_size() for program in programs] == before
  assert before[1:] == [1, 1]


# -- refused


@pytest.mark.parametrize(
  ("row", "options", "said"),
  [
    (MethodConfig(block=2, window=0), {}, "window = 0.*a stream has no end; give a window"),
    (
      MethodConfig(order="block_first", level="clean"),
      {},
      "block_first.*cannot be streamed.*only when the one before it is done.*hiar_jax.generate",
    ),
    (ROW, {"window": 2}, "window = 2 cannot hold a block"),
    (
      ROW,
      {"layout": Layout(level=3)},
      "level = 3 does not divide the 4 noise levels; level can be 1, 2 or 4",
    ),
    (
      ROW,
      {"layout": Layout(tensor=3)},
      "tensor = 3 does not divide 4 heads and 24 hidden units; tensor can be 1, 2 or 4",
    ),
    (
      ROW,
      {"layout": Layout(sequence=4)},
      "sequence = 4 does not divide 4 heads and 2 rows of tokens; sequence can be 1 or 2",
    ),
    (
      ROW,
      {"layout": Layout(tensor=4, sequence=2)},
      "tensor x sequence = 8 does not divide the 4 heads",
    ),
    (ROW, {"layout": Layout(level=4, tensor=2, sequence=2)}, "takes 16 devices; here are 8"),
  ],
)
def test_what_cannot_be_streamed(row, options, said):
  with pytest.raises(UserError, match=said) as raised:
    Engine(parts(row), TickOptions(**options))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (start(3), "a start of 3 latent frames: expected one .a picture., or whole blocks of 2"),
    (start(2)[:, :, :2], r"expected latents \[1, frames, 4, 4, 2\]"),
  ],
)
def test_a_start_that_does_not_fit(given, said):
  with pytest.raises(UserError, match=said):
    LiveVideo(engine(), "a", start=given)


@pytest.mark.parametrize(
  ("count", "layout"),
  [
    (1, Layout()),
    (2, Layout(2)),
    (3, Layout(2)),
    (4, Layout(4)),
    (7, Layout(4)),
    (8, Layout(4, 2)),
    (64, Layout(4, 4)),
  ],
)
def test_as_many_devices_as_can_be_used(count, layout):
  assert layouts.widest(count, LEVELS, CONFIG, SIZE[0]) == layout
