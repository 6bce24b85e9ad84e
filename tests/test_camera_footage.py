"""A folder as phones and cameras leave it, through training: every film is used, or named with the
reason.
"""

from fractions import Fraction
import json
import re

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax.video.conditioning_files import read_video
from tests.helpers import tiny_run
from tests.video.test_frame_pixels import flat_frame, hdr_signal, planes_of
from tests.video.test_video_file import B_FRAMES, trim
from tests.video.test_video_file import write as write_greys

SECONDS, RATE = 2, 8


def pictures(height: int, width: int, count: int = SECONDS * RATE):
  """A bar that moves over soft colours."""
  y, x = np.mgrid[:height, :width]
  for i in range(count):
    picture = np.stack([120 + 80 * np.sin(x / 9), 120 + 80 * np.cos(y / 7), 60 + 0 * x], -1)
    picture[:, 3 * i : 3 * i + 8] = (240, 240, 240)
    yield picture.astype(np.uint8)


def write(path, codec, form, size=(48, 64), rate=RATE, options=None, set_up=None, sound=False):
  height, width = size
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width, stream.pix_fmt = height, width, form
    if set_up:
      set_up(stream)
    audio = container.add_stream("aac", rate=16000) if sound else None
    for picture in pictures(height, width, SECONDS * rate):
      if form.startswith(("yuva", "rgba")):
        picture = np.dstack([picture, np.full((height, width), 255, np.uint8)])
      kind = "rgba" if picture.shape[2] == 4 else "rgb24"
      frame = av.VideoFrame.from_ndarray(picture, format=kind)
      container.mux(stream.encode(frame.reformat(format=form)))
    container.mux(stream.encode())
    if audio:
      write_sound(container, audio)
  return path


def write_sound(container, stream) -> None:
  tone = np.sin(np.arange(16000 * SECONDS) / 9).astype(np.float32)
  for first in range(0, len(tone) - 1023, 1024):
    frame = av.AudioFrame.from_ndarray(tone[None, first : first + 1024], "fltp", "mono")
    frame.sample_rate, frame.pts = 16000, first
    container.mux(stream.encode(frame))
  container.mux(stream.encode())


def write_hdr(path, transfer: int) -> None:
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=RATE, options={"crf": "8"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc = 9, 9, transfer
    for i in range(SECONDS * RATE):
      signal = 255 * hdr_signal((200 - 8 * i, 60, 40), transfer, 9, 203)
      values = np.rint(planes_of(signal, 9, 4)).astype(int)
      container.mux(stream.encode(flat_frame(values, "yuv420p10le", 9, 48, 64)))
    container.mux(stream.encode())


def make(folder) -> None:
  write(folder / "with_sound.mp4", "libx264", "yuv420p", sound=True)
  turned = lambda stream: stream.set_display_rotation(90)
  write(folder / "portrait.mov", "libx264", "yuv420p", set_up=turned)
  write(folder / "ten_bit.mkv", "libx265", "yuv420p10le", options={"x265-params": "log-level=none"})
  write(folder / "hi10.mp4", "libx264", "yuv420p10le")
  # frames at uneven times, shown in another order than they are stored
  write_greys(folder / "variable.mp4", [0, 1, 2, 5, 6, 7, 20, 21, 22, 23, 40, 41, 60], 24)
  interlaced = {"flags": "+ildct+ilme", "q": "2", "b": "8M"}
  write(folder / "interlaced.mpg", "mpeg2video", "yuv420p", (96, 128), 25, interlaced)
  whole = write_greys(folder.parent / "whole.mp4", range(32), 8, options=B_FRAMES)
  trim(whole, folder / "trimmed.mp4", 16)
  write_hdr(folder / "hdr_pq.mp4", 16)
  write_hdr(folder / "hdr_hlg.mp4", 18)
  squeezed = lambda stream: setattr(stream, "sample_aspect_ratio", Fraction(2))
  write(folder / "anamorphic.mp4", "libx264", "yuv420p", set_up=squeezed)
  write(folder / "alpha.mov", "prores_ks", "yuva444p10le", options={"profile": "4444"})
  write(folder / "old.avi", "mpeg4", "yuv420p", rate=30)
  write(folder / "web.webm", "libvpx-vp9", "yuv420p")
  # and what cannot be used
  content = (folder / "with_sound.mp4").read_bytes()
  (folder / "broken.mp4").write_bytes(content[: len(content) // 3])
  with av.open(str(folder / "only_sound.mp4"), "w") as container:
    write_sound(container, container.add_stream("aac", rate=16000))
  write_greys(folder / "short.mp4", [0, 1], 8)
  (folder / "empty.mov").write_bytes(b"")
  for path in list(folder.iterdir()):
    path.with_suffix(".txt").write_text(f"footage {path.stem.replace('_', ' ')}")
  write(folder / "no_caption.mp4", "libx264", "yuv420p")
  Image.fromarray(next(iter(pictures(48, 64)))).save(folder / "photo.jpg")
  (folder / ".DS_Store").write_bytes(b"Mac")


USED = {
  *("with sound", "portrait", "ten bit", "hi10", "variable", "interlaced", "trimmed", "hdr pq"),
  *("hdr hlg", "anamorphic", "alpha", "old", "web"),
}
SKIPPED = {
  "broken.mp4": "",
  "only_sound.mp4": "no video stream",
  "short.mp4": "too short: 2 frames at 8 frames a second, a clip needs 4",
  "empty.mov": "",
  "no_caption.mp4": "no caption: there is no no_caption.txt beside it",
}
CHANGED = {
  "turned upright by its container's note": 1,
  "deinterlaced": 1,
  "made BT.709 from HDR (PQ)": 1,
  "made BT.709 from HDR (HLG)": 1,
}


@pytest.mark.slow
def test_every_film_is_used_or_named_with_its_reason(tmp_path):
  folder = tmp_path / "footage"
  folder.mkdir()
  make(folder)
  chain = tiny_run.Chain(tmp_path)
  try:
    done = chain.train(
      tmp_path / "w",
      data__source="videos",
      data__folder=folder,
      data__held_out=0.3,
      codec__lapped=True,
    )
  finally:
    chain.close()
  assert done.returncode == 0, done.stderr
  skipped = dict(re.findall(r"skipped (\S+): (.*)", done.stderr))
  assert skipped.keys() == SKIPPED.keys(), done.stderr
  for name, reason in SKIPPED.items():
    assert reason in skipped[name] and skipped[name]
  assert f"{len(USED)} of {len(USED) + len(SKIPPED)} videos used, {len(SKIPPED)} skipped" in (
    done.stderr
  )
  assert "left out: 1 .jpg, 1 beginning with a dot" in done.stderr
  for change, count in CHANGED.items():
    assert f"{count} of {len(USED)} videos: {change}" in done.stderr, change
  assert f"1 of {len(USED)} videos: its pixels of 2:1 made square" in done.stderr
  _, captions = tiny_run.trajectories(tmp_path / "w")
  captions = {caption.decode() for caption in captions}
  assert captions <= {f"footage {name}" for name in USED} and len(captions) > 3
  measured = json.loads((tmp_path / "w" / "sample" / "metrics.json").read_text())
  assert measured["codec"]["clips"] == "held out" and np.isfinite(measured["motion"]["total"])


def test_the_same_folder_is_read_at_once(tmp_path, caplog):
  """The data stage alone: which films, and no other."""
  from hiar_jax.data import video_folder
  from hiar_jax.video.video_file import Sampling

  folder = tmp_path / "footage"
  folder.mkdir()
  make(folder)
  films = video_folder.scan(folder, video_folder.Cut(Sampling(4, 16, 16, 8, 4)))
  assert {film.caption for film in films} == {f"footage {name}" for name in USED}
  assert all(film.records for film in films)


def test_a_continuation_says_that_it_has_no_sound(tmp_path):
  for sound in (True, False):
    write(tmp_path / "film.mp4", "libx264", "yuv420p", sound=sound)
    _, message = read_video(tmp_path / "film.mp4", 48, 64, RATE)
    assert ("without its sound" in message) == sound
