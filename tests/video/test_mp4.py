"""Files that people look at: what is written comes back, and a file is whole or not there."""

import json
import os
import signal
import subprocess
import sys

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax import files
from hiar_jax.errors import UserError
from hiar_jax.video import mp4_boxes
from hiar_jax.video.fragmented_mp4 import FragmentedMP4
from hiar_jax.video.mp4 import read_metadata, write_mp4
from hiar_jax.video.png import write_png
from tests.helpers.video_reader import read_mp4


def moving_square(frames=12, size=32):
  video = np.full((frames, size, size, 3), (40, 60, 80), np.uint8)
  for i in range(frames):
    video[i, 8:18, 2 + i : 12 + i] = (230, 40, 40)
  return video


@pytest.mark.parametrize("scale, mean, worst", [(1, 4, 120), (4, 1.5, 24), (8, 1.5, 16)])
def test_mp4_round_trip(tmp_path, scale, mean, worst):
  video = moving_square()
  metadata = {
    "prompt": 'a "réd" square\nmoving right',
    "seed": "3",
    "config": json.dumps({"a": [1, 2]}),
  }
  path = write_mp4(tmp_path / "new folder" / "clip.mp4", video, 12, metadata, scale=scale)
  frames, fps, read = read_mp4(path, scale=scale)
  error = np.abs(frames.astype(int) - video)
  assert (frames.shape, fps, read) == (video.shape, 12.0, metadata)
  assert error.mean() < mean and error.max() < worst
  assert sorted(os.listdir(path.parent)) == ["clip.mp4"]


def test_mp4_is_plain_h264_that_players_know(tmp_path):
  path = write_mp4(tmp_path / "clip.mp4", moving_square()[:, :31, :29], 23.976, scale=3)
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    context = stream.codec_context
    assert (context.name, context.pix_fmt, context.width, context.height) == (
      "h264",
      "yuv420p",
      88,
      94,
    )
    assert float(stream.average_rate) == pytest.approx(24000 / 1001, rel=1e-5)
    assert stream.frames == 12
    assert int(context.colorspace) == 1


def test_the_index_comes_before_the_frames(tmp_path):
  """So that a page plays a file that it has not whole yet."""
  path = write_mp4(tmp_path / "clip.mp4", np.zeros((40, 64, 64, 3), np.uint8))
  names = [name for name, *_ in mp4_boxes.boxes(path.read_bytes())]
  assert [name for name in names if name in ("moov", "mdat")] == ["moov", "mdat"]


def test_colours_are_not_shifted_by_the_yuv_matrix(tmp_path):
  video = (
    np.zeros((2, 32, 32, 3), np.uint8)
    + np.array([[20, 160, 60], [200, 30, 180]], np.uint8)[:, None, None]
  )
  frames, _, _ = read_mp4(write_mp4(tmp_path / "c.mp4", video, scale=4))
  assert np.abs(frames[:, 64, 64].astype(int) - video[:, 16, 16]).max() <= 4


def test_same_video_gives_the_same_bytes(tmp_path):
  paths = [
    write_mp4(tmp_path / name, moving_square(), 16, {"seed": "1"}, scale=2)
    for name in ("a.mp4", "b.mp4")
  ]
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_foreign_comment_is_no_metadata(tmp_path):
  path = tmp_path / "foreign.mp4"
  with av.open(str(path), "w") as container:
    container.metadata["comment"] = "holiday"
    stream = container.add_stream("libx264", rate=10)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    for frame in moving_square(3):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())
  frames, _, metadata = read_mp4(path)
  assert frames.shape == (3, 32, 32, 3) and metadata == {}


@pytest.mark.parametrize(
  "frames, arguments",
  [
    (np.zeros((0, 8, 8, 3), np.uint8), {}),
    (np.zeros((4, 8, 8, 3), np.float32), {}),
    (np.zeros((4, 8, 8), np.uint8), {}),
    (np.zeros((4, 8, 8, 3), np.uint8), {"scale": 0}),
    (np.zeros((4, 8, 8, 3), np.uint8), {"fps": 0}),
  ],
)
def test_bad_frames_are_one_line(tmp_path, frames, arguments):
  with pytest.raises(UserError, match="clip.mp4") as error:
    write_mp4(tmp_path / "clip.mp4", frames, **arguments)
  assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_what_is_no_video_has_no_metadata(tmp_path):
  (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
  good = write_mp4(tmp_path / "good.mp4", moving_square()).read_bytes()
  (tmp_path / "cut.mp4").write_bytes(good[:200])
  for name in ("noise.mp4", "cut.mp4", "absent.mp4"):
    assert read_metadata(tmp_path / name) is None


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
  before = path.read_bytes()

  def full_disk(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full_disk)
  with pytest.raises(UserError, match="no space left on the disk of .*a.png"):
    write_png(path, np.full((4, 4, 3), 9, np.uint8))
  assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_killed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
  """SIGKILL between the last byte and the rename: the old file stands, and the next process that
  writes there removes what was left.
  """
  path = write_mp4(tmp_path / "clip.mp4", moving_square(), metadata={"seed": "old"})
  code = (
    "import os, signal, sys, numpy as np\nfrom hiar_jax.video import mp4 as media\n"
    "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    "media.write_mp4(sys.argv[1], np.zeros((3, 32, 32, 3), np.uint8), metadata={'seed': 'new'})"
  )
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  killed = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert read_mp4(path)[2] == {"seed": "old"}
  monkeypatch.setattr(files, "_seen", set())  # as in another process
  write_mp4(path, moving_square(), metadata={"seed": "new"})
  assert read_mp4(path)[2] == {"seed": "new"} and os.listdir(tmp_path) == ["clip.mp4"]


def test_png_round_trip(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
  with Image.open(write_png(tmp_path / "a.png", image)) as read:
    np.testing.assert_array_equal(np.asarray(read), image)
  with pytest.raises(UserError, match="float64"):
    write_png(tmp_path / "b.png", image / 255)


# -------------------------------------------------------------------------------- a video in pieces


def test_pieces_are_one_video(tmp_path):
  video = moving_square()
  whole = write_mp4(tmp_path / "whole.mp4", video, metadata={"seed": "1"}, scale=2)
  pieces = (video[start : start + 5] for start in range(0, 12, 5))
  assert (
    write_mp4(tmp_path / "pieces.mp4", pieces, metadata={"seed": "1"}, scale=2).read_bytes()
    == whole.read_bytes()
  )


def test_pieces_are_asked_for_one_by_one(tmp_path):
  """Only one piece is alive at a time, however long the video."""
  import weakref

  alive, most = [], 0

  def pieces():
    nonlocal most
    for _ in range(6):
      piece = np.zeros((4, 32, 32, 3), np.uint8)
      alive.append(weakref.ref(piece))
      most = max(most, sum(ref() is not None for ref in alive))
      yield piece

  assert len(read_mp4(write_mp4(tmp_path / "a.mp4", pieces()))[0]) == 24
  assert most <= 3  # the first (its size is the video's), the last and the next


def test_where_pieces_end_badly_the_old_file_stands(tmp_path):
  path = write_mp4(tmp_path / "clip.mp4", moving_square(), metadata={"seed": "old"})

  def broken():
    yield moving_square(3)
    raise FileNotFoundError(2, "not the video's fault", "weights")

  with pytest.raises(FileNotFoundError, match="not the video's fault"):
    write_mp4(path, broken(), metadata={"seed": "new"})
  with pytest.raises(
    UserError,
    match=r"clip.mp4: a piece has frames of \(16, 16, 3\), the first one of \(32, 32, 3\)",
  ):
    write_mp4(path, iter([moving_square(3), moving_square(3, 16)]))
  with pytest.raises(UserError, match="expected uint8"):
    write_mp4(path, iter([]))
  assert read_mp4(path)[2] == {"seed": "old"} and os.listdir(tmp_path) == ["clip.mp4"]


def test_a_full_disk_is_said_while_a_video_is_written(tmp_path, monkeypatch):
  path = write_mp4(tmp_path / "clip.mp4", moving_square(), metadata={"seed": "old"})

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match="no space left on the disk of .*clip.mp4"):
    write_mp4(path, moving_square())
  assert read_mp4(path)[2] == {"seed": "old"} and os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_frames_are_encoded(tmp_path, monkeypatch):
  monkeypatch.setattr(
    files, "_open_temporary", lambda path: (path, open("/dev/full", "wb", buffering=0))
  )
  with pytest.raises(UserError, match="no space left on the disk of .*clip.mp4"):
    write_mp4(
      tmp_path / "clip.mp4",
      np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
    )


def test_names_that_are_not_utf8_come_with_question_marks(tmp_path):
  said = {"prompt": "a réd square", "start": "image caf\udce9.png"}
  path = write_mp4(tmp_path / "clip.mp4", moving_square(), metadata=said)
  with FragmentedMP4(tmp_path / "stream.mp4", 8, said) as file:
    file.write(moving_square())
  for written in (path, file.path):
    assert read_metadata(written) == {"prompt": "a réd square", "start": "image caf?.png"}


def test_where_no_file_can_be_written(tmp_path):
  (tmp_path / "a_file").write_text("")
  with pytest.raises(UserError, match="a_file/x.mp4: cannot be written"):
    write_mp4(tmp_path / "a_file" / "x.mp4", moving_square())
