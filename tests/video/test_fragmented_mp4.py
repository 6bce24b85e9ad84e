"""What a stream leaves on the disk plays while it grows, and after its process was killed."""

import errno
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax.errors import UserError
from hiar_jax.video import fragmented_mp4, mp4_boxes
from hiar_jax.video.fragmented_mp4 import FragmentedMP4
from hiar_jax.video.mp4 import read_metadata
from hiar_jax.video.png import PNGFolder
from tests.helpers.video_reader import read_mp4


def pieces(count, frames=5, size=(32, 30)):
  """Frames of a moving square, in pieces."""
  video = np.full((count * frames, *size, 3), (40, 60, 80), np.uint8)
  for i, frame in enumerate(video):
    frame[8:18, 2 + i % 16 : 12 + i % 16] = (230, 40, 40)
  return [video[i * frames : (i + 1) * frames] for i in range(count)]


def write(path, videos, **options):
  with FragmentedMP4(path, 8, {"prompt": "a réd square", "seed": "3"}, scale=4, **options) as file:
    return [file.write(frames) for frames in videos]


def times(path):
  with av.open(str(path)) as container:
    return [frame.time for frame in container.decode(video=0)]


def test_every_fragment_is_there_when_write_returns(tmp_path):
  path, videos = tmp_path / "new" / "clip.mp4", pieces(4)
  with FragmentedMP4(path, 8, {"prompt": "a réd square", "seed": "3"}, scale=4) as file:
    for i, frames in enumerate(videos, 1):
      fragment = file.write(frames)
      assert (fragment.first, fragment.frames, fragment.end) == (
        5 * (i - 1),
        5,
        path.stat().st_size,
      )
      shown, fps, said = read_mp4(path, scale=4)
      assert len(shown) == 5 * i and fps == 8 and said == {"prompt": "a réd square", "seed": "3"}
  error = np.abs(shown.astype(int)[:, :32, :30] - np.concatenate(videos))
  assert error.mean() < 2
  assert times(path) == [i / 8 for i in range(20)]
  assert os.listdir(path.parent) == ["clip.mp4"]


def test_fragments_are_what_browsers_want(tmp_path):
  """Each starts with a key frame, at its place in time, and the head says which codec it is."""
  path = tmp_path / "clip.mp4"
  with FragmentedMP4(path, 23.976) as file:
    made = [file.write(frames) for frames in pieces(3)]
  assert file.mime.startswith('video/mp4; codecs="avc1.64')
  assert fragmented_mp4.scan(path)[1:] == made
  content = path.read_bytes()
  head = content[: made[0].start]
  for i, fragment in enumerate(made):
    alone = tmp_path / f"{i}.mp4"
    alone.write_bytes(head + content[fragment.start : fragment.end])
    assert times(alone) == pytest.approx([(5 * i + n) * 1001 / 24000 for n in range(5)], abs=1e-3)


def told(path):
  """(the duration in seconds, [(seconds, offset) of each fragment]) as a closed file has them."""
  content = path.read_bytes()
  boxes = {name: start for name, start, _ in mp4_boxes.boxes(content, deep=True)}
  seconds = 0.0
  if "mehd" in boxes:
    (units,) = struct.unpack_from(">Q", content, boxes["mehd"] + 12)
    seconds = units / mp4_boxes.timescale(content, "mvhd")
  if "mfra" not in boxes:
    return seconds, []
  (length,) = struct.unpack(">I", content[-4:])  # how players find it
  assert len(content) - length == boxes["mfra"]
  table = boxes["mfra"] + 8
  (count,) = struct.unpack_from(">I", content, table + 20)
  entries = [struct.unpack_from(">QQ", content, table + 24 + 19 * i) for i in range(count)]
  units = mp4_boxes.timescale(content, "mdhd")
  return seconds, [(time / units, offset) for time, offset in entries]


def test_a_closed_file_says_how_long_it_is_and_where_its_fragments_are(tmp_path):
  """And an open one, or one that is gone on with, does not say what is no longer true."""
  path, videos = tmp_path / "clip.mp4", pieces(4)
  made = write(path, videos)
  assert told(path) == (2.5, [(5 / 8 * i, part.start) for i, part in enumerate(made)])
  with FragmentedMP4(path, 8, scale=4, keep=10) as file:
    assert told(path) == (0, [])
    file.write(videos[2])
    assert told(path) == (0, [])
  assert told(path) == (15 / 8, [(5 / 8 * i, part.start) for i, part in enumerate(made[:3])])
  assert times(path) == [i / 8 for i in range(15)]


def test_the_same_frames_are_the_same_bytes(tmp_path):
  for name in "ab":
    write(tmp_path / name, pieces(3))
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_a_fragment_half_written_is_passed_over(tmp_path, monkeypatch):
  """Whatever part of its bytes is on the disk: the file plays to the one before, and can be gone on
  with.
  """
  path, cut = tmp_path / "clip.mp4", tmp_path / "cut.mp4"
  with monkeypatch.context() as patch:
    made = write(path, pieces(2))
    # killed just before the fragment gets its name
    patch.setattr(os, "pwrite", lambda *_: 0)
    write(path, pieces(3)[2:], keep=10)
  content = path.read_bytes()
  for size in [
    *range(made[1].end, made[1].end + 200),
    *range(made[1].end + 200, len(content), 97),
    len(content),
  ]:
    cut.write_bytes(content[:size])
    assert len(fragmented_mp4.scan(cut)) == 3 and len(times_until_damage(cut)) == 10
  write(cut, pieces(3)[2:], keep=10)
  assert times(cut) == [i / 8 for i in range(15)]


def times_until_damage(path):
  """What a player shows: frames until one cannot be decoded."""
  found = []
  with av.open(str(path)) as container:
    try:
      found += [frame.time for frame in container.decode(video=0)]
    except av.error.InvalidDataError:
      pass
  return found


def test_a_fragment_is_on_the_disk_before_it_counts_as_one(tmp_path, monkeypatch):
  done = []
  with FragmentedMP4(tmp_path / "clip.mp4", 8) as file:
    file.write(pieces(1)[0])
    fsync, pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda *arguments: done.append("fsync") or fsync(*arguments))
    monkeypatch.setattr(
      os, "pwrite", lambda *arguments: done.append("pwrite") or pwrite(*arguments)
    )
    file.write(pieces(1)[0])
    assert done == ["fsync", "pwrite", "fsync"]


def test_a_video_is_gone_on_with(tmp_path):
  whole, path, videos = tmp_path / "whole.mp4", tmp_path / "clip.mp4", pieces(5)
  write(whole, videos)
  write(path, videos[:4])
  with open(path, "ab") as file:
    file.write(b"\0\0\1\0moof cut off")
  write(path, videos[3:], keep=15)  # the fourth is made anew
  a, b = (read_mp4(name)[0].astype(int) for name in (path, whole))
  np.testing.assert_allclose(a, b, atol=8)  # as far as H.264 may be off
  assert times(path) == times(whole)
  assert [fragment.first for fragment in fragmented_mp4.scan(path)[1:]] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize(
  "keep, size, what",
  [
    (7, (32, 30), "expected the first 7 to be whole"),
    (20, (32, 30), "holds 10 frames"),
    (10, (64, 64), "another size or quality"),
  ],
)
def test_what_cannot_be_gone_on_with_is_left_alone(tmp_path, keep, size, what):
  write(tmp_path / "clip.mp4", pieces(2))
  before = (tmp_path / "clip.mp4").read_bytes()
  with pytest.raises(UserError, match=what):
    write(tmp_path / "clip.mp4", pieces(1, size=size), keep=keep)
  assert (tmp_path / "clip.mp4").read_bytes() == before


@pytest.mark.parametrize("name", [b"mdhd", b"mvhd", b"mvex", b"avcC"])
def test_a_head_that_is_damaged_is_one_line(tmp_path, name):
  """Before anything of the file is changed."""
  path = tmp_path / "clip.mp4"
  with FragmentedMP4(path, 8) as file:
    file.write(pieces(1)[0])
  path.write_bytes(path.read_bytes().replace(name, b"what"))
  before = path.read_bytes()
  with pytest.raises(UserError, match="clip.mp4 is damaged .*give a video that a stream wrote"):
    FragmentedMP4(path, 8, keep=5)
  assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["pread", "fsync"])
def test_a_disk_that_refuses_the_cut_is_one_line(tmp_path, monkeypatch, call):
  path = tmp_path / "clip.mp4"
  write(path, pieces(2))

  def refuse(*_):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(fragmented_mp4.os, call, refuse)
  with pytest.raises(UserError, match=r"clip.mp4: cannot be written \(Input/output error\)"):
    FragmentedMP4(path, 8, keep=5)


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / "old.mp4").write_bytes(b"old")
  with pytest.raises(UserError, match="old.mp4 is there already"):
    FragmentedMP4(tmp_path / "old.mp4", 8)
  with pytest.raises(UserError, match="absent.mp4 is not there to be gone on with"):
    FragmentedMP4(tmp_path / "absent.mp4", 8, keep=3)
  with pytest.raises(UserError, match="old.mp4 is no fragmented MP4"):
    FragmentedMP4(tmp_path / "old.mp4", 8, keep=0)
  with pytest.raises(UserError, match="old.mp4/x.mp4: cannot be written"):
    FragmentedMP4(tmp_path / "old.mp4" / "x.mp4", 8)
  assert (tmp_path / "old.mp4").read_bytes() == b"old" and os.listdir(tmp_path) == ["old.mp4"]


def test_wrong_frames(tmp_path):
  with FragmentedMP4(tmp_path / "clip.mp4", 8) as file:
    with pytest.raises(UserError, match="expected uint8"):
      file.write(np.zeros((2, 8, 8, 3), np.float32))
    file.write(pieces(1)[0])
    with pytest.raises(UserError, match=r"frames of \(8, 8\), the first ones of \(32, 30\)"):
      file.write(np.zeros((2, 8, 8, 3), np.uint8))
  assert len(read_mp4(tmp_path / "clip.mp4")[0]) == 5


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  with FragmentedMP4(tmp_path / "clip.mp4", 8) as file:
    file.write(pieces(1)[0])

    def full(_):
      raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", full)
      with pytest.raises(UserError, match="no space left on the disk of .*clip.mp4"):
        file.write(pieces(1)[0])


WRITER = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from tests.video.test_fragmented_mp4 import pieces
from hiar_jax.video.fragmented_mp4 import FragmentedMP4

with FragmentedMP4(sys.argv[1], 8, {"seed": "3"}, scale=4) as file:
  for frames in itertools.cycle(pieces(3)):
    print(file.write(frames).end, flush=True)
"""


def test_a_killed_process_leaves_a_video_that_plays(tmp_path):
  path = tmp_path / "clip.mp4"
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path]),
  }
  command = [sys.executable, "-c", WRITER, str(path), str(pathlib.Path(__file__).parents[2])]
  with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
    told = [int(process.stdout.readline()) for _ in range(8)]
    playing = len(times_until_damage(path))  # while it is being written
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split(b"\n")[:-1] if line]
  assert process.returncode == -signal.SIGKILL
  whole = fragmented_mp4.scan(path)
  assert playing >= 40 and whole[-1].end >= told[-1] and len(whole) - 1 >= len(told)
  assert len(times_until_damage(path)) >= 5 * (len(whole) - 1)
  assert read_metadata(path) == {"seed": "3"}
  write(path, [], keep=5 * (len(whole) - 1))
  assert len(read_mp4(path)[0]) == 5 * (len(whole) - 1)


def test_pictures_in_a_folder(tmp_path):
  videos, folder = pieces(2), tmp_path / "frames"
  out = PNGFolder(folder)
  for frames in videos:
    out.write(frames)
  assert sorted(os.listdir(folder)) == [f"{i:06d}.png" for i in range(10)]
  with Image.open(folder / "000007.png") as read:
    np.testing.assert_array_equal(np.asarray(read), videos[1][2])
  with pytest.raises(UserError, match="frames holds 10 pictures already"):
    PNGFolder(folder)
  PNGFolder(folder, keep=7).write(videos[0][:1])
  assert sorted(os.listdir(folder))[-1] == "000007.png"
  with Image.open(folder / "000007.png") as read:
    np.testing.assert_array_equal(np.asarray(read), videos[0][0])
