"""A stream: chunks in order while they are made, prompts at block boundaries, errors where they are
seen, and nothing left behind.
"""

import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import hiar_jax
from hiar_jax.errors import UserError
from hiar_jax.generation import timeline
from hiar_jax.generation.timeline import Change
from hiar_jax.streaming.producer import Stream
from tests.helpers.fake_generation import PROMPTS, FakeDecoder, FakeGeneration, expected, latents_of
from tests.helpers.small_heap import small_heap  # noqa: F401


def open_stream(blocks=None, generation=None, decoder=None, **options):
  return Stream(
    generation or FakeGeneration(), decoder or FakeDecoder(), fps=8, blocks=blocks, **options
  )


def threads():
  return [thread for thread in threading.enumerate() if thread.name in ("_denoise", "_decode")]


def eventually(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.005)
  return condition()


@pytest.fixture(autouse=True)
def nothing_left(small_heap):  # noqa: F811
  yield
  gc.collect()
  assert eventually(lambda: not threads())


def test_chunks_come_in_order_and_say_what_they_are():
  with open_stream(5) as stream:
    chunks = list(stream)
  assert [chunk.block for chunk in chunks] == [0, 1, 2, 3, 4]
  assert [chunk.time for chunk in chunks] == [0, 3 / 8, 6 / 8, 9 / 8, 12 / 8]
  assert {chunk.prompt for chunk in chunks} == {"a red circle"} and chunks[
    0
  ].frames.dtype == np.uint8
  np.testing.assert_array_equal(
    np.concatenate([chunk.frames for chunk in chunks]), expected(PROMPTS[:1] * 5)
  )


def test_a_changed_prompt_is_seen_within_the_levels():
  generation = FakeGeneration()
  with open_stream(20, generation) as stream:
    chunks = [next(stream) for _ in range(3)]
    made = stream.made
    first = stream.change_prompt(PROMPTS[1], recache=True)
    assert made <= first <= made + generation.levels + 1
    chunks += list(stream)
  told = PROMPTS[:1] * first + PROMPTS[1:2] * (20 - first)
  assert [chunk.prompt for chunk in chunks] == told
  np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in chunks]), expected(told))
  assert generation.changes == [(first, PROMPTS[1], True)]


def test_what_a_stream_cannot_be_asked_for():
  with open_stream(2) as stream:
    for blocks in (-5, 1.5, True):
      with pytest.raises(UserError, match=f"blocks = {blocks}: expected a whole number, at least"):
        stream.extend(blocks)
    with pytest.raises(UserError, match="prompt = 5: expected text"):
      stream.change_prompt(5)
    assert len(list(stream)) == 2


def test_a_timeline_changes_prompts_at_its_blocks():
  changes = timeline.parse("0s: a red circle, 1s: a blue square, 2s recache: a green star").changes(
    lambda block: block * 3 / 8
  )
  with open_stream(9, changes=changes) as stream:
    told = [chunk.prompt for chunk in stream]
  assert told == PROMPTS[:1] * 3 + PROMPTS[1:2] * 3 + PROMPTS[2:] * 3


def test_denoising_goes_on_while_a_block_is_decoded():
  generation, begun = FakeGeneration(), []
  step = generation.step
  generation.step = lambda: begun.append(generation.next_block) or step()

  class Waits(FakeDecoder):
    def __call__(self, latents, memory):
      block = int(latents[0, 0, 0, 0, 0])
      assert eventually(lambda: begun[-1] >= block + generation.levels), (
        "no tick began while this block was decoded"
      )
      return super().__call__(latents, memory)

  decoder = Waits()
  with open_stream(generation=generation, decoder=decoder) as stream:
    assert [next(stream).block for _ in range(5)] == [0, 1, 2, 3, 4]
  assert generation.threads == {"_denoise"} and decoder.threads == {"_decode"}


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_caller_that_takes_nothing_holds_it_up(ahead):
  generation = FakeGeneration()
  with open_stream(generation=generation, prefetch=ahead) as stream:
    most = 2 * ahead + 1  # waiting for the decoder, in it or waiting for the caller
    assert eventually(lambda: stream.made >= 2 * ahead)
    time.sleep(0.1)
    assert stream.made <= most and generation.next_block <= most + generation.levels - 1
    next(stream)
    assert eventually(lambda: stream.made > 2 * ahead)


def test_pause_and_go_on():
  with open_stream() as stream:
    next(stream)
    stream.pause()
    assert eventually(lambda: not stream._work.ticking)
    before = stream.made
    time.sleep(0.05)
    for _ in range(before - 1):  # what was made can be taken
      next(stream)
    assert stream.made == before
    assert stream.change_prompt(PROMPTS[1]) == before + 3  # while it is paused
    stream.pause(False)
    assert next(stream).block == before


def test_speed_counts_the_time_at_work():
  """Not the time in which nobody took anything."""
  with open_stream(6, FakeGeneration(seconds=0.02), prefetch=1) as stream:
    assert stream.speed is None
    for _ in stream:
      time.sleep(0.2)
    assert 20 < stream.speed <= 3 / 0.02


def test_after_the_end_it_can_be_extended():
  with open_stream(2) as stream:
    assert len(list(stream)) == 2 and list(stream) == []
    stream.extend(3)
    assert [chunk.block for chunk in stream] == [2, 3, 4]


@pytest.mark.parametrize(
  "broken, error",
  [
    ({"generation": FakeGeneration(fail_at=2)}, FloatingPointError),
    ({"decoder": FakeDecoder(fail_at=2)}, ValueError),
  ],
)
def test_what_breaks_in_a_thread_is_raised_where_chunks_are_taken(broken, error):
  stream = open_stream(**broken)
  assert [next(stream).block, next(stream).block] == [0, 1]
  with pytest.raises(error, match="block 2"):
    next(stream)
  assert eventually(lambda: not threads())
  with pytest.raises(error):
    stream.change_prompt("more")


def test_a_prompt_that_cannot_be_taken_ends_nothing():
  generation = FakeGeneration()

  def refuse(*_):
    raise UserError("no such words")

  with open_stream(4, generation) as stream:
    generation.change_prompt = refuse
    with pytest.raises(UserError, match="no such words"):
      stream.change_prompt("zebra")
    assert len(list(stream)) == 4


def test_closing_early_frees_all():
  generation, decoder = FakeGeneration(), FakeDecoder()
  held = weakref.ref(generation), weakref.ref(decoder)
  stream = Stream(generation, decoder, fps=8)
  del generation, decoder
  next(stream)
  stream.close()
  assert not threads() and list(stream) == []
  assert held[0]() is None and held[1]() is None
  with pytest.raises(UserError, match="closed"):
    stream.save("nowhere")
  stream.close()


def test_closing_lets_go_of_whoever_waits():
  stream = open_stream(generation=FakeGeneration(seconds=0.2))
  taken = []
  waiting = threading.Thread(target=lambda: taken.extend(stream))
  waiting.start()
  stream.close()
  waiting.join(60)
  assert not waiting.is_alive() and taken == []


def test_a_stream_that_nobody_refers_to_ends():
  for chunk in open_stream():
    if chunk.block == 2:
      break
  gc.collect()
  assert eventually(lambda: not threads())


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_saved_and_gone_on_with_it_makes_the_same_frames(tmp_path, taken):
  """Whatever waited for the decoder or for the caller when it was saved; and the one that was saved
  goes on too.
  """
  changes = [Change(0, PROMPTS[0]), Change(4, PROMPTS[1]), Change(9, PROMPTS[2])]
  told = PROMPTS[:1] * 4 + PROMPTS[1:2] * 5 + PROMPTS[2:] * 3
  whole = expected(told)
  with open_stream(12, changes=changes) as stream:
    before = [next(stream) for _ in range(taken)]
    stream.save(tmp_path)
    assert stream.taken == 3 * taken
    after = list(stream)
  np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in before + after]), whole)
  with Stream.resume(
    FakeGeneration.restore(tmp_path), FakeDecoder(), (1, 3, 1, 1, 2), fps=8, blocks=12
  ) as again:
    assert again.taken == 3 * taken
    rest = list(again)
  assert [(chunk.block, chunk.prompt, chunk.time) for chunk in rest] == [
    (chunk.block, chunk.prompt, chunk.time) for chunk in after
  ]
  np.testing.assert_array_equal(
    np.concatenate([chunk.frames for chunk in rest]), whole[3 * taken :]
  )


def test_what_no_stream_saved(tmp_path):
  FakeGeneration().save(tmp_path)
  with pytest.raises(UserError, match="without what its decoder remembers"):
    Stream.resume(FakeGeneration.restore(tmp_path), FakeDecoder(), (1, 3, 1, 1, 2), fps=8)


def test_a_start_comes_first():
  with open_stream(2, given=latents_of(7, "given", frames=1)) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == [1, 3, 3] and [
    chunk.time for chunk in chunks
  ] == [0, 1 / 8, 4 / 8]


# ----------------------------------------------------------------------------------------- the name


@pytest.mark.slow
def test_importing_the_package_loads_no_jax():
  code = (
    "import sys, hiar_jax; assert 'jax' not in sys.modules; import hiar_jax.stream; assert "
    "callable(hiar_jax.stream)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_there_is_nothing_else_in_the_package():
  with pytest.raises(AttributeError, match="no attribute 'steam'"):
    hiar_jax.steam  # noqa: B018


@pytest.mark.parametrize(
  "options, what",
  [
    ({"promt": "a"}, "did you mean 'prompt'"),
    ({}, "give either prompt="),
    ({"prompt": "a", "timeline": "0s: b"}, "give either prompt="),
    ({"timeline": "0s: a, 3s: b, 2s: c"}, "timeline, line 1, column 15: 2s comes after 3s"),
    ({"prompt": "a", "frames": "many"}, "frames = 'many': expected a whole number, or 'endless'"),
    ({"prompt": "a", "frames": 0}, "expected at least 1"),
    ({"prompt": "a", "image": "a.png", "video": "b.mp4"}, "either image or video"),
    ({"prompt": "a", "resume": "saved"}, "leave prompt, image and video out"),
    ({"prompt": "a", "level_devices": 0}, "level = 0"),
    ({"prompt": "a"}, "workdir is missing"),
  ],
)
def test_wrong_options_are_one_line(options, what):
  with pytest.raises(UserError) as error:
    hiar_jax.stream(**options)
  assert what in str(error.value) and "\n" not in str(error.value)
  assert "--" not in str(error.value)  # options, not flags
