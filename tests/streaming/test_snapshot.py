"""A generation on disk: restored on any layout it goes on with the same frames; what does not fit
is one line.
"""

import dataclasses
import functools
import json
import shutil

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.checkpoints import checksums
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import UserError
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers.slow_cases import slow
from tests.helpers.tiny_stream import (
  CONFIG,
  PACKED,
  ROW,
  SAF,
  assert_same,
  parts,
  quick_engine,
  take,
)

ONE = Layout()


@functools.cache
def engine(layout: Layout = ONE, row=ROW, identity: str = "tiny", **options):
  return quick_engine(parts(row, identity=identity), TickOptions(layout=layout, **options))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  """(directory of a generation saved at block 37 on four stages, what it made of the next 12
  blocks).
  """
  directory = tmp_path_factory.mktemp("saved") / "generation"
  generation = LiveVideo(engine(Layout(4)), "a red circle", seed=5)
  take(generation, 35)
  # still on its way through the levels when saved
  generation.change_prompt("a blue square", recache=True)
  take(generation, 2)
  generation.decoder = {"frames": jnp.arange(6.0).reshape(2, 3), "count": np.int32(7)}
  generation.save(directory)
  return directory, take(generation, 12)


@pytest.mark.parametrize("layout", [Layout(4), *slow(Layout(2, 2), Layout())], ids=str)
def test_goes_on_with_the_same_frames_on_another_layout(running, layout):
  directory, expected = running
  generation = LiveVideo.restore(directory, engine(layout))
  assert generation.engine.layout == layout and generation.prompt == "a blue square"
  assert generation.in_flight == [
    (1, 39, "a blue square"),
    (2, 38, "a blue square"),
    (3, 37, "a red circle"),
  ]
  found = take(generation, 12)
  if layout == Layout(4):
    np.testing.assert_array_equal(found, expected)
  assert_same(found, expected)


@pytest.mark.parametrize("layout", slow(Layout(1, 2), Layout(4)), ids=str)
def test_a_packed_history_goes_on_on_another_layout(tmp_path, layout):
  model = parts(PACKED, dataclasses.replace(CONFIG, packing=(2,)))
  generation = LiveVideo(quick_engine(model, TickOptions(layout=ONE)), "a red circle", seed=5)
  take(generation, 9)
  generation.save(tmp_path / "g")
  expected = take(generation, 4)
  again = LiveVideo.restore(tmp_path / "g", quick_engine(model, TickOptions(layout=layout)))
  assert_same(take(again, 4), expected)


def test_numbers_go_on_and_the_decoders_state_comes_back(running):
  directory, _ = running
  generation = LiveVideo.restore(directory, engine())
  count, frames = generation.decoder  # leaves, in the order of the tree's
  assert int(count) == 7
  np.testing.assert_array_equal(frames, np.arange(6.0).reshape(2, 3))
  emitted = generation.step()
  assert emitted.block == 37


def test_a_picture_start_and_a_full_pipe_are_remembered(tmp_path):
  picture = np.ones((1, 1, 4, 4, CONFIG.channels), np.float32)
  generation = LiveVideo(engine(), "a", seed=1, start=picture)
  generation.step()
  generation.save(tmp_path / "g")
  again = LiveVideo.restore(tmp_path / "g", engine())
  assert again.decoder is None
  np.testing.assert_array_equal(take(generation, 3), take(again, 3))
  assert again.step().block == 4


@pytest.mark.slow
def test_saved_while_a_clean_sink_is_made(tmp_path):
  row = dataclasses.replace(SAF, sink=4, window=8)
  generation = LiveVideo(engine(row=row), "a red circle", seed=1)
  head = take(generation, 1)
  generation.change_prompt("a blue square")
  generation.save(tmp_path / "g")
  again = LiveVideo.restore(tmp_path / "g", engine(row=row))
  assert head.shape[1] == row.block
  np.testing.assert_array_equal(take(generation, 5), take(again, 5))


def test_saving_again_replaces(tmp_path):
  generation = LiveVideo(engine(), "a", seed=1)
  generation.save(tmp_path / "g")
  generation.change_prompt("b")
  generation.save(tmp_path / "g")
  assert [entry.name for entry in (tmp_path / "g").iterdir()] == ["2"]
  assert LiveVideo.restore(tmp_path / "g", engine()).prompt == "b"


def test_the_model_that_did_not_make_it_is_refused(running):
  directory, _ = running
  with pytest.raises(
    UserError,
    match="was saved by another model .tiny; this one is other.*give the model that made it",
  ) as raised:
    LiveVideo.restore(directory, engine(identity="other"))
  assert "\n" not in str(raised.value)
  with pytest.raises(UserError, match="another model"):
    LiveVideo.restore(directory, parts(identity="other"))


def test_a_model_that_is_no_engine_yet_gets_the_options_it_was_saved_with(tmp_path):
  generation = LiveVideo(engine(sink_positions="relative", window=9), "a", seed=1)
  generation.save(tmp_path / "g")
  method = LiveVideo.restore(tmp_path / "g", parts(), Layout(2)).engine.method
  assert (method.window, method.sink_positions) == (9, "relative")


def test_other_options_are_refused(running):
  directory, _ = running
  with pytest.raises(
    UserError, match="saved with other options .sink_positions = absolute, here relative"
  ):
    LiveVideo.restore(directory, engine(sink_positions="relative"))


def test_where_nothing_is_saved(tmp_path, running):
  for name in ("nothing", "a" * 300):
    with pytest.raises(UserError, match="holds no saved generation"):
      LiveVideo.restore(tmp_path / name, engine())
  with pytest.raises(UserError, match="holds no saved generation"):
    LiveVideo.restore(tmp_path, engine())
  with Checkpoints(tmp_path / "training", config={"a": 1}) as checkpoints:
    checkpoints.save(1, {"x": jnp.ones(1)}, {"x": jnp.ones(1)})
  with pytest.raises(UserError, match="a checkpoint, but not of a generation"):
    LiveVideo.restore(tmp_path / "training", engine())


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"first": ...}, "is damaged .*first"),
    ({"seed": "x"}, "seed = 'x': expected a whole number"),
    ({"prompt": 5}, "is damaged .*5 for a prompt"),
    ({"prompts": [[1, "a"]]}, "is damaged .KeyError"),  # others are in flight
    ({"prompts": 3}, "is damaged .TypeError"),
    ({"anew": ["x"]}, "is damaged .TypeError"),
    ({"head": [3]}, "is damaged .*a clean sink is being made, and this model has none"),
    ({"block": 0.5}, "is damaged .TypeError"),
    ({"text": {"shape": [1, 3, 8], "dtype": "x"}}, "is damaged .TypeError"),
    ({"text": {"shape": [], "dtype": "float32"}}, r"is damaged .*a text of float32 \(\)"),
    (
      {"text": {"shape": [1, -3, 8], "dtype": "float32"}},
      r"is damaged .*a text of float32 \(1, -3",
    ),
    ({"text": {"shape": [1, 3, 8], "dtype": "S5"}}, r"is damaged .*a text of"),
    ({"options": 5}, "is damaged .TypeError"),
    (
      {"options": {"windw": 9}},
      "is damaged .*windw|saved with other options .windw = 9, here None",
    ),
    ({"options": {"sink_place": "x"}}, "is damaged .KeyError"),
  ],
  ids=str,
)
@pytest.mark.parametrize("model", [engine, parts], ids=["engine", "parts"])
def test_metadata_that_no_stream_saves(running, tmp_path, model, change, said):
  shutil.copytree(running[0], tmp_path / "g")
  (step,) = (tmp_path / "g").iterdir()
  path = step / "config" / "metadata"
  metadata = {**json.loads(path.read_text()), **change}
  path.write_text(json.dumps({name: x for name, x in metadata.items() if x is not ...}))
  checksums.write(epath.Path(step))
  with pytest.raises(UserError, match=said):
    LiveVideo.restore(tmp_path / "g", model())


def test_a_damaged_one_is_one_line(running, tmp_path):
  directory = tmp_path / "g"
  shutil.copytree(running[0], directory)
  for path in directory.rglob("*"):
    if path.is_file() and path.stat().st_size > 500:
      path.write_bytes(path.read_bytes()[:-100] + b"x" * 100)
  with pytest.raises(UserError, match="damaged") as raised:
    LiveVideo.restore(directory, engine())
  assert "\n" not in str(raised.value)
