"""A packed model's stream: the frames that generate makes, section by section, in fixed memory."""

import time

import jax
import numpy as np
from PIL import Image
import pytest

from hiar_jax.errors import UserError
from hiar_jax.generation import clips, prompts_file, timeline
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.serving.session import Limits, Request, Session
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.packed_engine import PackedEngine
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_packed
from tests.helpers.slow_cases import slow
from tests.helpers.untrained import (  # noqa: F401
  PROMPT,
  SEED,
  compiles_quickly,
  frames,
  generated,
  untrained,
)

ANOTHER = "a blue square moving up"
DAY = f"0s: {PROMPT}, 0.4s: {ANOTHER}"
SCHEDULES = {  # what history shows, beside the experiment's own schedule
  "the video's first frame": "f1k1_x_td_f2k2f1k1_g2",
  "the mean of older frames": "tc_f1k2f1k1_g2",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return StreamingModel(untrained(tmp_path_factory.mktemp("model"), tiny_packed.make_config()))


def made_by_generate(model, frames: int, **told) -> np.ndarray:
  """The video's pixels, uint8 [F H W 3]."""
  jobs = prompts_file.make_jobs(["" if "timeline" in told else PROMPT], SEED, **told)
  planned = clips.plan_clips(model, jobs, [None], frames)
  with jax.set_mesh(model.run.mesh):
    (made,) = clips.make_clips(model, planned)
    return np.concatenate(list(clips.shown(model, made.clip, made.latents)))


def test_it_is_the_video_that_generate_makes(source):
  """Bit for bit, by a section each, shown as soon as it is made."""
  with source.open(PROMPT, seed=SEED, frames=9) as stream:
    chunks = list(stream)
  assert [(c.block, len(c.frames), c.time) for c in chunks] == [(n, 2, n / 4) for n in range(5)]
  np.testing.assert_array_equal(frames(chunks), made_by_generate(source.model, 10))


@pytest.mark.slow
def test_prompts_by_the_second(source):
  with source.open(timeline=timeline.parse(DAY), seed=SEED, frames=8) as stream:
    chunks = list(stream)
  assert [chunk.prompt for chunk in chunks] == [PROMPT, PROMPT, ANOTHER, ANOTHER]
  want = made_by_generate(source.model, 8, timeline=DAY)
  np.testing.assert_array_equal(frames(chunks), want)
  assert (want[4:] != made_by_generate(source.model, 8)[4:]).any()


def test_a_change_holds_from_the_next_section_on(source):
  generation = LiveVideo(source.engine, PROMPT, SEED)
  assert generation.step().block == 0 and generation.in_flight == []
  assert generation.change_prompt(ANOTHER, recache=True) == 1
  changed = np.asarray(generation.step().latents)
  same = LiveVideo(source.engine, PROMPT, SEED)
  same.step(), same.change_prompt(ANOTHER)  # there is no context to be encoded again
  np.testing.assert_array_equal(changed, same.step().latents)
  assert (changed != generated(source.model, 2)[:, 2:]).any()


@pytest.mark.parametrize("kind, count", [("image", 1), ("video", 5)])
def test_it_goes_on_from_a_file(source, tmp_path, kind, count):
  """From all of a video's frames, as generate does: five are no whole sections."""
  Image.fromarray(np.full((16, 16, 3), (250, 10, 10), np.uint8)).save(tmp_path / "image.png")
  grey = (40 * np.arange(1, 6, dtype=np.uint8))[:, None, None, None]
  write_mp4(tmp_path / "video.mp4", np.broadcast_to(grey, (5, 16, 16, 3)), 8)
  (path,) = tmp_path.glob(f"{kind}.*")
  start = Conditioning(path, kind)
  with source.open(PROMPT, seed=SEED, frames=count + 4, start=start) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == [count, 2, 2]
  want = made_by_generate(source.model, count + 4, **{kind: path})
  np.testing.assert_array_equal(frames(chunks), want)


def test_saved_and_gone_on_with(source, tmp_path):
  """In another process's place: an engine of its own."""
  day = timeline.parse(DAY)
  with source.open(timeline=day, seed=SEED, frames=8) as stream:
    first = [next(stream)]
    stream.save(tmp_path / "saved")
  other = StreamingModel(source.model)
  with other.resume(tmp_path / "saved", frames=10) as again:
    assert (again.taken, again.seed) == (2, SEED)
    chunks = first + list(again)
  np.testing.assert_array_equal(frames(chunks), made_by_generate(source.model, 10, timeline=DAY))


def test_the_page_shows_it(source, tmp_path):
  """As hiar_jax.serve starts: compiled first, a generation for each viewer."""
  source.engine.warm("")
  request = Request(PROMPT, SEED, seconds=1.0)
  session = Session(source, request, tmp_path / "x.mp4", Limits(), lambda: None)
  try:
    for _ in range(200):
      if (status := session.status())["state"] == "finished":
        break
      time.sleep(0.05)
    assert (status["blocks"], status["frames"], status["why"]) == (4, 8, "")
    assert [level["sigma"] for level in status["levels"]] == [1.0]
  finally:
    session.close()


@pytest.mark.parametrize("name", slow("the video's first frame", "the mean of older frames"))
def test_what_lies_further_back(tmp_path, name):
  """Rounding may differ where the mean is a running one."""
  config = tiny_packed.make_config(framepack__packing=SCHEDULES[name], sample__steps=1)
  model = untrained(tmp_path, config)
  generation = LiveVideo(model, PROMPT, SEED)
  parts = [np.asarray(generation.step().latents) for _ in range(4)]
  rounding = 1e-5 if "tc" in SCHEDULES[name] else 0
  want = generated(model, 4)
  np.testing.assert_allclose(np.concatenate(parts, axis=1), want, rtol=0, atol=rounding)


def test_memory_does_not_grow(source):
  def held(generation) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(generation._pipe))

  def alive() -> int:
    return sum(x.nbytes for x in jax.live_arrays())

  generation = LiveVideo(source.engine, PROMPT, SEED)
  sizes, all_of_it = [], []
  for section in range(1, 41):
    generation.step()
    if section in (5, 40):
      jax.block_until_ready(generation._pipe.latents)
      sizes.append(held(generation))
      all_of_it.append(alive())
  assert generation.next_block == 40 and sizes[0] == sizes[1] and all_of_it[0] == all_of_it[1]
  # the frames that the schedule names, and no program for each length
  assert generation._pipe.latents.shape[1] == 3
  assert source.engine.main.compiled_tick._cache_size() == 1


REFUSED = {  # (experiment, changes, options) -> the one line
  "both ends": ("shapes_framepack_both_ends", {}, {}, "order = 'both_ends': sections that are not"),
  "backwards": ("shapes_framepack_inverted", {}, {}, "order = 'inverted': sections that are not"),
  "appended": ("", {"framepack__packing": "ta_f1k1_g2"}, {}, "tail .ta. holds all frames"),
  "sorted": ("", {"framepack__sort": "similarity"}, {}, "'similarity' chooses among all frames"),
  "an end": ("", {"framepack__packing": "td_f1k1_g2_x_f1k1"}, {}, "need the video's length"),
  "published": (
    "",
    {"framepack__packing": "td_f1k1_g2_f1k1", "framepack__published": True},
    {},
    "need the video's length",
  ),
  "devices": ("", {}, {"layout": Layout(level=2)}, "level_devices = 2: a packed model"),
  "a window": ("", {}, {"window": 9}, "window = 9: a packed model .*leave window out"),
  "no sink": ("", {}, {"sink": 0}, "sink = 0: a packed model"),
  "a moving sink": ("", {}, {"sink_positions": "relative"}, "sink_positions = relative: a packed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_is_one_line(tmp_path, monkeypatch, case):
  name, changes, options, message = REFUSED[case]
  model = untrained(tmp_path, tiny_packed.make_config(name or "shapes_framepack", **changes))
  monkeypatch.setattr(type(model), "params", lambda self: pytest.fail("weights were loaded"))
  source = StreamingModel(model, TickOptions(**options))
  for opened in (
    lambda: source.open(PROMPT),
    lambda: source.resume(tmp_path / "nowhere"),
    lambda: source.engine,
  ):
    with pytest.raises(UserError, match=message) as error:
      opened()
    assert "\n" not in str(error.value)


def test_one_device_may_be_asked_for(source):
  engine = PackedEngine.of(source.model, TickOptions(layout=Layout()))
  assert engine.layout == Layout() and engine.window == 5


def test_a_model_that_goes_on_from_frames_needs_some(tmp_path, monkeypatch):
  model = untrained(tmp_path, tiny_packed.make_config(framepack__given=1, data__frames=7))
  monkeypatch.setattr(type(model), "params", lambda self: pytest.fail("weights were loaded"))
  with pytest.raises(UserError, match="towards a first frame that is given .*give --image"):
    StreamingModel(model).open(PROMPT)
