"""Wan streamed from end to end, on small random weights of its layout: the frames that generate
makes, through the streamed autoencoder.
"""

import dataclasses
import os
import runpy

import jax
import numpy as np
from PIL import Image
import pytest

import hiar_jax
from hiar_jax.components.block_decoder import CausalDecoder
from hiar_jax.generation import video_model
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.video import fragmented_mp4
from hiar_jax.video.mp4 import read_metadata, write_mp4
from tests.helpers import tiny_run
from tests.helpers.tiny_wan import CONFIG, save_weights
from tests.helpers.untrained import (
  assert_same_pixels,
  compiles_quickly,  # noqa: F401
  frames,
)

PROMPT, SEED = "A cat walks on the grass", 9
# frames of the first blocks: 4 latent frames of 3, the very first of one frame
COUNTS = [9, 12, 12]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory with config.py, weights/, cat.png and before.mp4."""
  root = tmp_path_factory.mktemp("wan")
  (root / "config.py").write_text(CONFIG)
  save_weights(root / "weights")
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)).save(
    root / "cat.png"
  )
  ramp = np.linspace(0, 255, 9).astype(np.uint8)[:, None, None, None]
  write_mp4(root / "before.mp4", np.broadcast_to(ramp, (9, 16, 32, 3)), 16)
  return root


def config(place):
  return runpy.run_path(str(place / "config.py"))["get_config"]()


@pytest.fixture(scope="module")
def model(place):
  found = video_model.from_config(config(place), str(place / "weights"), video_model.ModelChanges())
  one = make_mesh(MeshConfig(), jax.devices()[:1])
  return dataclasses.replace(found, run=dataclasses.replace(found.run, mesh=one))


@pytest.fixture(scope="module")
def source(model):
  """On two stages; the decoder has a device of its own."""
  return StreamingModel(model, TickOptions(layout=Layout(level=2)))


def generated(model, blocks, start=None):
  """uint8 [F H W 3], as hiar_jax.generate makes them. start: given latents."""
  model.prepare_texts([PROMPT])
  given = [] if start is None else [start]
  make = model.sampler(blocks * model.experiment.history.block)
  latents = make(model.params(), model.run.texts([PROMPT]), np.asarray([SEED]), *given)
  return model.run.pixels(np.asarray(latents))[0]


@pytest.fixture(scope="module")
def whole(model):
  """The first 33 frames."""
  return generated(model, 3)


@pytest.mark.slow
def test_it_is_the_video_that_generate_makes(source, whole):
  assert isinstance(source.decoder, CausalDecoder) and source.decoder.device == jax.devices()[2]
  with source.open(PROMPT, seed=SEED, frames=33) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == COUNTS and [chunk.time for chunk in chunks] == [
    0,
    9 / 16,
    21 / 16,
  ]
  assert whole.shape == (33, 16, 32, 3) and whole.std() > 1
  assert_same_pixels(frames(chunks), whole)


def test_saved_with_the_autoencoders_memory_and_gone_on_with_on_one_device(
  model, source, whole, tmp_path
):
  with source.open(PROMPT, seed=SEED, frames=33) as stream:
    first = next(stream)
    stream.save(tmp_path / "saved")
  with StreamingModel(model, TickOptions(layout=Layout())).resume(
    tmp_path / "saved", frames=33
  ) as again:
    assert again.taken == 9
    assert_same_pixels(np.concatenate([first.frames, frames(again)]), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, name, counts", [("image", "cat.png", [1, 12, 12]), ("video", "before.mp4", [9, 12, 12])]
)
def test_from_a_start(model, source, place, kind, name, counts):
  start = Conditioning(place / name, kind)
  latents = model.run.autoencoder.latents(start.read(model.experiment)[0][None])
  with source.open(PROMPT, seed=SEED, frames=sum(counts), start=start) as stream:
    chunks = list(stream)
  assert [len(chunk.frames) for chunk in chunks] == counts
  assert_same_pixels(frames(chunks), generated(model, 2, latents))


@pytest.mark.slow
def test_the_name_of_the_package_streams_it(place, whole):
  """On as many devices as can be used, with a change of prompt."""
  options = {"config": config(place), "weights": str(place / "weights"), "seed": SEED, "frames": 33}
  with hiar_jax.stream(timeline=f"0s: {PROMPT}, 1s: a dog", **options) as stream:
    chunks = list(stream)
    assert stream._work.generation.engine.layout == Layout(level=2, tensor=2)
  assert [chunk.prompt for chunk in chunks] == [PROMPT, PROMPT, "a dog"]
  assert_same_pixels(frames(chunks[:2]), whole[:21])
  assert np.abs(frames(chunks[2:]).astype(int) - whole[21:]).max() > 1


@pytest.mark.slow
def test_the_commands(place, tmp_path, tmp_path_factory):
  """Pictures, for H.264 is too coarse for such noise: in one go, and in two parts on other
  layouts.
  """
  chain = tiny_run.chain(tmp_path_factory.getbasetemp())
  base = [
    "hiar_jax.stream",
    f"--config={place}/config.py",
    f"--weights={place}/weights",
    f"--seed={SEED}",
  ]
  prompt, saved = f"--prompt={PROMPT}", tmp_path / "saved"
  cases = [
    [*base, prompt, "--frames=33", f"--out={tmp_path}/whole"],
    [*base, prompt, "--frames=21", f"--out={tmp_path}/parts", f"--save={saved}"],
    [*base, f"--resume={saved}", "--frames=33", f"--out={tmp_path}/parts", "--level_devices=1"],
    [
      *base,
      prompt,
      "--frames=33",
      f"--out={tmp_path}/tiny.mp4",
      "--decoder=tiny_vae",
      f"--image={place}/cat.png",
    ],
  ]
  results = chain.commands([(module, arguments) for module, *arguments in cases], devices=2)
  assert [(status, err.count("Traceback")) for status, _, err in results] == [(0, 0)] * 4, results
  names = [f"{i:06d}.png" for i in range(33)]
  assert sorted(os.listdir(tmp_path / "whole")) == sorted(os.listdir(tmp_path / "parts")) == names
  whole, parts = (
    np.stack([np.asarray(Image.open(tmp_path / of / name)) for name in names])
    for of in ("whole", "parts")
  )
  assert whole.std() > 1
  assert_same_pixels(whole, parts)
  assert [fragment.frames for fragment in fragmented_mp4.scan(tmp_path / "tiny.mp4")[1:]] == [
    1,
    12,
    12,
    12,
  ]
  assert read_metadata(tmp_path / "tiny.mp4")["start"] == "image cat.png"
