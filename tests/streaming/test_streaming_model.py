"""A stream from end to end: the pixels of the video that generate makes, prompts by the second,
saved and gone on with elsewhere.
"""

from types import SimpleNamespace

import jax
import numpy as np
from PIL import Image
import pytest

from hiar_jax.components.block_decoder import CausalDecoder
from hiar_jax.components.wan_autoencoder import WanCodecConfig
from hiar_jax.errors import UserError
from hiar_jax.generation import timeline
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.method import MethodConfig
from hiar_jax.models import vae
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.streaming_model import StreamingModel
from tests.helpers import tiny_run
from tests.helpers.untrained import (  # noqa: F401
  PROMPT,
  SEED,
  assert_same_pixels,
  compiles_quickly,
  frames,
  generated,
  untrained,
)

ANOTHER = "a blue square moving up"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  model = untrained(tmp_path_factory.mktemp("model"), tiny_run.make_config())
  return StreamingModel(model, TickOptions(layout=Layout()))


@pytest.fixture(scope="module")
def wide(source):
  """The same model on another layout."""
  return StreamingModel(source.model, TickOptions(layout=Layout(level=4)))


@pytest.fixture(scope="module")
def whole(source):
  """uint8 [12 H W 3]"""
  return source.model.run.pixels(generated(source.model, 6))[0]


def test_it_is_the_video_that_generate_makes(source, whole):
  with source.open(PROMPT, seed=SEED, frames=12) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == [2] * 6 and [
    chunk.time for chunk in chunks
  ] == [i / 4 for i in range(6)]
  assert_same_pixels(frames(chunks), whole)


@pytest.mark.slow
def test_saved_with_blocks_on_their_way_and_gone_on_with_on_another_layout(
  source, wide, whole, tmp_path
):
  day = timeline.parse(f"0s: {PROMPT}, 1s: {ANOTHER}")
  with source.open(timeline=day, seed=SEED, frames=16) as stream:
    first = [next(stream), next(stream)]
    stream.save(tmp_path / "saved")
    rest = list(stream)
  assert [chunk.prompt for chunk in first + rest] == [PROMPT] * 4 + [ANOTHER] * 4
  assert_same_pixels(frames(first + rest)[:8], whole[:8])
  assert np.abs(frames(first + rest)[8:12].astype(int) - whole[8:12]).max() > 1
  with wide.resume(tmp_path / "saved", frames=16) as again:
    assert (again.taken, again.seed) == (4, SEED)
    chunks = list(again)
  assert [(chunk.block, chunk.prompt, chunk.time) for chunk in chunks] == [
    (chunk.block, chunk.prompt, chunk.time) for chunk in rest
  ]
  assert_same_pixels(frames(chunks), frames(rest))
  with pytest.raises(UserError, match="frames = 4, but .*saved has 4 already"):
    wide.resume(tmp_path / "saved", frames=4)


def test_a_picture_is_the_first_frame(source, tmp_path):
  Image.fromarray(np.full((16, 16, 3), (250, 10, 10), np.uint8)).save(tmp_path / "red.png")
  with source.open(
    PROMPT, seed=SEED, frames=5, start=Conditioning(tmp_path / "red.png", "image")
  ) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == [1, 2, 2] and [
    chunk.block for chunk in chunks
  ] == [0, 1, 2]
  with pytest.raises(UserError, match="the given start has 1 already"):
    source.open(PROMPT, frames=1, start=Conditioning(tmp_path / "red.png", "image"))


def test_what_to_show_is_said_once(source):
  for options in ({}, {"prompt": "a", "timeline": timeline.parse("0s: a")}):
    with pytest.raises(UserError, match="give either a prompt"):
      source.open(**options)


def test_seconds_of_blocks():
  e = SimpleNamespace(
    history=MethodConfig(block=3), codec=WanCodecConfig(), sample=SimpleNamespace(fps=16)
  )
  made = StreamingModel(SimpleNamespace(experiment=e))
  start = made.seconds(given=0)
  assert [start(block) * 16 for block in range(4)] == [0, 9, 21, 33]
  after = made.seconds(given=1)  # a picture stands for block 0
  assert [after(block) * 16 for block in range(1, 4)] == [1, 13, 25]


# ------------------------------------------------------------------------------ causal autoencoders


VAE = vae.VAEConfig(dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)


@pytest.mark.slow
def test_a_causal_decoder_remembers():
  """Block by block, and after its memory has been on the disk, the frames of the whole."""
  latents = np.random.default_rng(0).normal(size=(1, 6, 4, 4, 16)).astype(np.float32)
  stream = WanCodecConfig().decoder(VAE, vae.init(VAE, jax.random.key(0)))
  device = jax.devices()[3]
  decoder, memory, pieces = CausalDecoder(stream, device), None, []
  for start in range(0, 6, 2):
    pixels, memory = decoder(latents[:, start : start + 2], memory)
    memory = decoder.remember(
      [np.asarray(leaf) for leaf in jax.tree.leaves(memory)], latents[:, :2].shape
    )
    pieces.append(pixels)
  assert [len(piece) for piece in pieces] == [3, 4, 4]
  np.testing.assert_array_equal(
    np.concatenate(pieces), np.concatenate([piece[0] for piece in stream(latents)])
  )
  assert {leaf.device for leaf in jax.tree.leaves(memory)} == {device}
  assert decoder.remember([], latents.shape) is None
