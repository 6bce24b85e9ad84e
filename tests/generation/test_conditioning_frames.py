"""What a video starts from: one frame of an image, the last whole blocks of a video."""

import runpy

import numpy as np
from PIL import Image
import pytest

from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.training.experiment import Experiment
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def experiment():
  config = runpy.run_path(str(tiny_run.ROOT / "experiments" / "hiar_wan_1_3b.py"))["get_config"]()
  config.data.size = (32, 48)
  return build(Experiment, config)


def count_up(path, frames, fps=16):
  """Frame i is grey i * 10."""
  grey = (np.arange(frames, dtype=np.uint8) * 10)[:, None, None, None]
  return write_mp4(path, np.broadcast_to(grey, (frames, 32, 48, 3)), fps)


def test_of_a_video_that_comes_last_the_beginning_is_kept(experiment, tmp_path):
  """The new frames lead up to its first one."""
  end = Conditioning(count_up(tmp_path / "a.mp4", 12), "video", is_end=True)
  pixels, said = end.read(experiment)
  assert len(pixels) == 9 and pixels[0].max() < 5 and "its first 9 of 12 frames" in said


@pytest.mark.parametrize(
  "frames, first, kept, latent", [(9, 0, 9, 3), (12, 3, 9, 3), (21, 0, 21, 6), (24, 3, 21, 6)]
)
def test_of_a_video_the_end_is_kept(experiment, tmp_path, frames, first, kept, latent):
  """It goes on from there: what does not fill a block is left out at its beginning."""
  pixels, said = Conditioning(count_up(tmp_path / "a.mp4", frames), "video").read(experiment)
  assert len(pixels) == kept and experiment.codec.latent_frames(len(pixels)) == latent
  assert np.abs(pixels[:, 9, 9, 0] - 10.0 * np.arange(first, frames)).max() <= 2
  assert said == (
    f"a.mp4: its last {kept} of {frames} frames, which are whole blocks" if kept < frames else ""
  )


def test_frames_are_counted_at_the_models_rate(experiment, tmp_path):
  # 1.5 seconds: 24 frames at 16 a second
  pixels, said = Conditioning(count_up(tmp_path / "a.mp4", 12, fps=8), "video").read(experiment)
  assert len(pixels) == 21
  assert (
    said
    == "a.mp4: 32x48, resampled from 8 to 16 frames a second, its last 21 of 24 frames, which are "
    "whole blocks"
  )


def test_an_image_is_one_frame(experiment, tmp_path):
  Image.fromarray(np.full((32, 48, 3), 99, np.uint8)).save(tmp_path / "a.png")
  pixels, said = Conditioning(tmp_path / "a.png", "image").read(experiment)
  assert (
    pixels.shape == (1, 32, 48, 3)
    and said == ""
    and experiment.codec.latent_frames(len(pixels)) == 1
  )


def test_too_short_a_video(experiment, tmp_path):
  with pytest.raises(
    UserError,
    match="a.mp4 has 8 frames at 16 a second, a start needs whole blocks, at least 9 frames; give "
    "a longer",
  ):
    Conditioning(count_up(tmp_path / "a.mp4", 8), "video").read(experiment)


def test_of_an_image_or_a_video(tmp_path):
  assert Conditioning.of(None, None) is None
  assert Conditioning.of(tmp_path, None) == Conditioning(tmp_path, "image")
  assert Conditioning.of(None, str(tmp_path)) == Conditioning(tmp_path, "video")
  assert Conditioning.of(None, tmp_path, is_end=True).is_end


def test_the_digest_is_of_the_content(tmp_path):
  for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
    (tmp_path / name).write_bytes(content)
  a, b, c = (Conditioning(tmp_path / name, "image").digest for name in "abc")
  assert a == b != c
