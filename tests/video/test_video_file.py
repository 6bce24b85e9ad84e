"""The clock of a file: what is shown when, and for how long, as its container says."""

from fractions import Fraction

import av
import numpy as np
import pytest

from hiar_jax.video import conditioning_files, video_file
from hiar_jax.video.video_file import Sampling

B_FRAMES = {"bf": "3", "b-adapt": "0", "crf": "10"}


def write(path, ticks, rate, codec="libx264", options=B_FRAMES):
  """Frame i of grey 3 * i is shown from ticks[i] / rate seconds on."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.codec_context.time_base = Fraction(1, rate)
    for i, tick in enumerate(ticks):
      frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 3 * i, np.uint8), format="rgb24")
      frame.pts, frame.time_base = tick, Fraction(1, rate)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def trim(source, path, first):
  """Cuts without encoding anew, as a phone's editor does: all is stored, an edit list shows from
  frame `first` on.
  """
  options = {"avoid_negative_ts": "disabled"}
  with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for packet in old.demux(video=0):
      if packet.dts is not None:
        ahead = int(first / 8 / packet.time_base)
        packet.pts, packet.dts, packet.stream = packet.pts - ahead, packet.dts - ahead, stream
        new.mux(packet)
  return path


def greys(path, fps):
  frames, _ = conditioning_files.read_video(path, 64, 64, fps)
  return frames[:, 32, 32, 0].astype(int)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_a_trimmed_film_is_read_as_it_is_shown(tmp_path, suffix):
  whole = write(tmp_path / "whole.mp4", range(64), 8)
  path = trim(whole, tmp_path / f"trimmed.{suffix}", 32)
  with av.open(str(path)) as container:
    assert container.streams.video[0].frames > 32, "it stores more than it shows"
  found = greys(path, 8)
  assert len(found) == 32
  np.testing.assert_allclose(found, 3 * np.arange(32, 64), atol=3)
  assert len(video_file.survey(path, Sampling(9, 64, 64, 8, 9))[0]) == 32


def test_a_trimmed_film_that_is_cut_off_is_refused(tmp_path):
  """The index comes first, and names frames that are not there."""
  path = trim(write(tmp_path / "whole.mp4", range(64), 8), tmp_path / "a.mp4", 32)
  first = tmp_path / "first.mp4"
  with av.open(str(path)) as old:
    options = {"avoid_negative_ts": "disabled", "movflags": "faststart"}
    with av.open(str(first), "w", options=options) as new:
      stream = new.add_stream_from_template(old.streams.video[0])
      for packet in old.demux(video=0):
        if packet.dts is not None:
          packet.stream = stream
          new.mux(packet)
  content = first.read_bytes()
  data = content.index(b"mdat")
  first.write_bytes(content[: data + (len(content) - data) * 3 // 4])
  with pytest.raises((video_file.Unusable, av.error.FFmpegError)):
    video_file.survey(first, Sampling(9, 64, 64, 8, 9))


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("after", [15, 3, 2, 1])
def test_a_pause_before_the_end_adds_no_frozen_tail(tmp_path, after, suffix):
  """With B-frames the container tells the pause of another frame; 60 frames are 3 s long."""
  ticks = [i if i < 60 - after else i + 30 for i in range(60)]
  shown = np.searchsorted(ticks, np.arange(90), side="right") - 1
  found = greys(write(tmp_path / f"a.{suffix}", ticks, 30), 30)
  assert len(found) == 90
  np.testing.assert_allclose(found, 3 * shown, atol=2)


def test_a_picture_that_is_held_at_the_end_is_held(tmp_path):
  """A slide show is as long as its pictures, the last one included."""
  assert len(greys(write(tmp_path / "slides.mp4", range(3), 1), 8)) == 24
  path = write(tmp_path / "held.mp4", [0, 1, 2, 3], 2, options={"bf": "0", "crf": "10"})
  assert len(greys(path, 8)) == 16


@pytest.mark.parametrize("rate", [24, 25, 30, 60])
@pytest.mark.parametrize("suffix, codec", [("mkv", "libx264"), ("webm", "libvpx")])
def test_every_frame_of_a_rounded_clock_is_read_once(tmp_path, rate, suffix, codec):
  """Matroska stores milliseconds, so that frames come a little before or after their time."""
  options = B_FRAMES if codec == "libx264" else {"crf": "4", "b": "4M"}
  found = greys(write(tmp_path / f"a.{suffix}", range(80), rate, codec, options), rate)
  assert len(found) == 80
  np.testing.assert_allclose(found, 3 * np.arange(80), atol=2)
