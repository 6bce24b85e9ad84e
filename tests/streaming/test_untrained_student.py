"""The shapes world's student, streamed: the frames that `hiar_jax.generate` makes of the same
prompt and seed.
"""

import runpy

import pytest

from hiar_jax.streaming.compiled_tick import Engine, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers import tiny, tiny_run
from tests.helpers.tiny_stream import assert_same, take
from tests.helpers.untrained import PROMPT, SEED, generated, untrained

SAF = {
  "history__level": "input",
  "history__sink": 2,
  "history__window": 6,
  "history__sink_level": "clean",
  "history__gradient": "attached",
}


@pytest.mark.slow
def test_a_clean_sink_as_it_is_generated(tmp_path):
  model = untrained(tmp_path, tiny_run.make_config(**SAF))
  generation = LiveVideo(model, PROMPT, SEED, TickOptions(layout=Layout(level=2)))
  assert_same(take(generation, 5), generated(model, 5))


@pytest.mark.slow
def test_from_a_picture(tmp_path):
  model = untrained(tmp_path, tiny_run.make_config())
  given = tiny.random(4, 1, *model.experiment.latent.block(1))
  generation = LiveVideo(Engine(model, TickOptions(layout=Layout())), PROMPT, SEED, start=given)
  assert_same(take(generation, 3), generated(model, 3, given))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  """The shipped experiment at its size, and what is generated of it."""
  model = untrained(
    tmp_path_factory.mktemp("shapes"),
    runpy.run_path(str(tiny_run.ROOT / "experiments" / "shapes.py"))["get_config"](),
  )
  return model, generated(model, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "layout",
  [
    Layout(),
    Layout(2),
    Layout(1, 2),
    Layout(4),
    Layout(2, 2),
    Layout(1, 2, 2),
    Layout(2, 2, 2),
    None,
  ],
  ids=str,
)
def test_the_shapes_student_on_one_to_eight_devices(shapes, layout):
  """None: all of them, a pipe of four stages of two devices."""
  model, expected = shapes
  generation = LiveVideo(model, PROMPT, SEED, TickOptions(layout=layout))
  assert generation.engine.layout == (layout or Layout(level=4, tensor=2))
  assert_same(take(generation, 5), expected, rounding=5e-5)
