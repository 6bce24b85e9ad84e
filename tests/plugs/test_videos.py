"""Videos and streams of a model of one's own parts, against a loop that keeps nothing."""

import functools

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax.errors import UserError
from hiar_jax.rollout.noise import block_noise
from hiar_jax.streaming.layout import Layout, widest
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers.tiny_stream import take
from tests.helpers.untrained import assert_same_pixels, frames
from tests.plugs.network import Groupwise
from tests.plugs.oracle import Oracle

PROMPT, SEED, BLOCKS = "a red circle moving left", 3, 4
FRAMES = 1 + 2 * (2 * BLOCKS - 1)
ROWS = {
  "step_first": dict(window=0, sink=0),
  "window_and_sink": dict(window=5, sink=1),
  "block_first": dict(order="block_first", window=5, sink=1),
}


@pytest.fixture(scope="module")
def model(trained):
  return hiar_jax.load(trained)


@pytest.fixture(scope="module")
def plain(model):
  """Row of the table -> latents of the oracle [1 f h w c]."""

  @functools.cache
  def latents(positions="absolute", **row):
    changed = model.with_method(**row)
    e = changed.experiment
    key = jax.random.fold_in(jax.random.key(e.seed), 3)
    noise = jax.jit(block_noise(key, np.asarray([SEED]), e.latent.block(e.history.block)))
    method = e.history.at(changed.run.sigmas, positions)
    network, text = e.student_dit, model.texts([PROMPT])
    assert isinstance(network, Groupwise) and method.level == "half"
    return Oracle(network, jax.device_get(model.params()), text, method, noise).video(BLOCKS)

  return latents


@pytest.mark.parametrize("name", ROWS)
def test_a_video(model, plain, name):
  changed, expected = model.with_method(**ROWS[name]), plain(**ROWS[name])
  latents = changed.sample_latents([PROMPT], FRAMES, SEED)
  np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
  video = changed.generate(PROMPT, frames=FRAMES, seed=SEED)
  assert video.shape == (FRAMES, 16, 16, 3)
  assert_same_pixels(video, changed.decode(expected[0]))


@pytest.mark.parametrize(
  ("layout", "positions"),
  [
    ((1, 1, 1), "absolute"),
    ((1, 1, 1), "relative"),
    ((4, 2, 1), "relative"),
    ((2, 1, 2), "absolute"),
  ],
)
def test_a_stream(model, plain, layout, positions):
  expected = plain(positions, **ROWS["window_and_sink"])
  devices = zip(("level_devices", "tensor_devices", "sequence_devices"), layout, strict=True)
  options = {"frames": FRAMES, "seed": SEED, "sink_positions": positions, **dict(devices)}
  with model.stream(PROMPT, **options) as stream:
    streamed = list(stream)
  # the first latent frame of a video is one frame of pixels
  assert [len(chunk.frames) for chunk in streamed] == [3, 4, 4, 4]
  assert_same_pixels(frames(streamed), model.decode(expected[0]))
  engine = list(model._streaming.values())[-1].engine
  latents = take(LiveVideo(engine, PROMPT, SEED), BLOCKS)
  np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
  assert engine.layout == Layout(*layout)
  kv = engine.main.shardings.past.kv.both.spec
  # [s frames depth 2 heads b t d]
  assert (kv[0], kv[4]) == ("level", ("tensor", "sequence"))


def test_the_sink_moves(plain):
  row = ROWS["window_and_sink"]
  assert np.abs(plain(**row) - plain("relative", **row)).max() > 1e-3


def test_a_layout_asks_the_network():
  network = Groupwise(16, 2, 4, 6, 8)
  assert widest(8, 4, network, 4) == Layout(4, 2)
  assert widest(64, 4, network, 4) == Layout(4, 4)
  with pytest.raises(
    UserError, match="tensor = 3 does not divide 4 heads; tensor can be 1, 2 or 4"
  ):
    Layout(tensor=3).check(4, network, 4)


def test_an_axis_that_a_network_does_not_split_is_one_device():
  class Whole(Groupwise):
    def splits(self, height):
      return {}

  assert widest(64, 4, Whole(16, 2, 4, 6, 8), 4) == Layout(4)
  with pytest.raises(UserError, match="sequence = 2 does not divide .*; sequence can be 1$"):
    Layout(sequence=2).check(4, Whole(16, 2, 4, 6, 8), 4)
