"""Files of others: odd, damaged or hostile ones give a picture, a clip, or one line."""

import errno
import pathlib

import numpy as np
from PIL import Image
import pytest

from hiar_jax.data import video_folder
from hiar_jax.errors import UserError
from hiar_jax.video import conditioning_files, foreign_files, mp4, video_file
from tests.helpers.video_reader import clips

SAMPLING = video_file.Sampling(3, 16, 16, 8, 3)
CUT = video_folder.Cut(SAMPLING)


def video(path: pathlib.Path, title="Cafe!!") -> pathlib.Path:
  return mp4.write_mp4(path, np.zeros((5, 16, 16, 3), np.uint8), 8, {"title": title})


def altered(path: pathlib.Path, old: bytes, new: bytes) -> pathlib.Path:
  content = video(path).read_bytes()
  assert old in content and len(old) == len(new)
  path.write_bytes(content.replace(old, new))
  return path


def test_tags_that_are_not_utf8_are_passed_over(tmp_path):
  path = altered(tmp_path / "cafe.mp4", b"Cafe!!", b"Caf\xe9!!")
  assert conditioning_files.read_video(path, 16, 16, 8)[0].shape == (5, 16, 16, 3)
  assert len(video_file.survey(path, SAMPLING)[0]) >= 3
  assert len(list(clips(path, SAMPLING))) == 1
  assert mp4.read_metadata(path) == {"title": "Caf\ufffd!!"}


def test_a_video_of_an_unknown_codec_is_one_line(tmp_path):
  path = altered(tmp_path / "odd.mp4", b"avc1", b"zzzz")
  with pytest.raises(UserError, match="odd.mp4 (cannot be used|is not a video)") as error:
    conditioning_files.read_video(path, 16, 16, 8)
  assert "\n" not in str(error.value)
  (tmp_path / "odd.txt").write_text("odd")
  video(tmp_path / "good.mp4")
  (tmp_path / "good.txt").write_text("good")
  assert [film.path.name for film in video_folder.scan(tmp_path, CUT)] == ["good.mp4"]


ERRORS = [
  (IndexError("index out of range"), "index out of range"),
  (AttributeError("'VideoStream' has no\nattribute"), "'VideoStream' has no"),
  (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "codec can't decode"),
  (MemoryError(), "more memory than there is"),
  (OSError(errno.ENOSPC, "No space left on device"), "the disk for temporary files is full"),
]


@pytest.mark.parametrize("error, said", ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("kind", ["picture", "video", "folder"])
def test_whatever_decoders_raise_is_one_line(tmp_path, monkeypatch, kind, error, said):
  def fail(*_, **__):
    raise error

  if kind == "picture":
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(UserError, match=said) as caught:
      conditioning_files.read_image(path, 16, 16)
  else:
    path = video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(video_file.Look, "cover", fail)
    with pytest.raises(UserError, match=said) as caught:
      if kind == "video":
        conditioning_files.read_video(path, 16, 16, 8)
      else:
        video_folder.scan(tmp_path, CUT)
  assert "\n" not in str(caught.value)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://%s\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4"])
def test_a_list_of_other_files_is_not_a_video(tmp_path, name):
  other = video(tmp_path / "other.mp4")
  path = tmp_path / name
  lists = {"list.m3u8": PLAYLIST % other, "list.mp4": "ffconcat version 1.0\nfile other.mp4\n"}
  path.write_text(lists[name])
  with pytest.raises(UserError, match="list.* cannot be used .of a format that is not read here"):
    conditioning_files.read_video(path, 16, 16, 8)
  with pytest.raises(foreign_files.Unusable, match="of a format that is not read here"):
    video_file.survey(path, SAMPLING)


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
  from PIL import EpsImagePlugin

  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
  path = tmp_path / "a.eps"
  Image.new("RGB", (8, 8)).save(path)
  with pytest.raises(UserError, match="a.eps is not an image"):
    conditioning_files.read_image(path, 16, 16)


def test_frames_larger_than_the_header_says_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 255)
  path = video(tmp_path / "a.mp4")
  with pytest.raises(UserError, match="a.mp4 cannot be used .frame 0 has 16 x 16 pixels"):
    conditioning_files.read_video(path, 16, 16, 8)
