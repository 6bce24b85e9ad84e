"""Files that are written whole: also where two processes write one, or where one was killed."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from hiar_jax import files
from hiar_jax.files import whole_file, write_atomic
from hiar_jax.video.mp4 import read_metadata, write_mp4


@pytest.fixture(autouse=True)
def anew(monkeypatch):
  """Each test is a process of its own: it has looked through no folder yet."""
  monkeypatch.setattr(files, "_seen", set())


def hidden(folder):
  return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_two_writers_of_one_file_leave_that_of_one(tmp_path):
  """The first one ends while the second one writes: what it left is not written into."""
  path = tmp_path / "a.bin"
  with whole_file(path) as second:
    second.write(b"22")
    write_atomic(path, b"first")
    assert path.read_bytes() == b"first"
    second.write(b"22")
    second.flush()
    assert path.read_bytes() == b"first"
  assert path.read_bytes() == b"2222" and not hidden(tmp_path)


def test_two_videos_of_one_name(tmp_path):
  path, piece = tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8)

  def second():
    yield piece
    write_mp4(path, piece, metadata={"prompt": "first"})
    yield piece
    assert read_metadata(path) == {"prompt": "first"}

  write_mp4(path, second(), metadata={"prompt": "second"})
  assert read_metadata(path) == {"prompt": "second"} and not hidden(tmp_path)


def test_links_are_not_followed(tmp_path, monkeypatch):
  """Also where the name of the temporary file is guessed."""
  names = iter(["0" * 16, "1" * 16])
  monkeypatch.setattr(files.secrets, "token_hex", lambda size: next(names))
  precious = tmp_path / "precious"
  precious.write_bytes(b"old")
  (tmp_path / "out").mkdir()
  for name in (".a.bin.tmp", f".{'0' * 16}.a.bin.tmp"):
    (tmp_path / "out" / name).symlink_to(precious)
  write_atomic(tmp_path / "out/a.bin", b"new")
  assert precious.read_bytes() == b"old" and (tmp_path / "out/a.bin").read_bytes() == b"new"
  assert not (tmp_path / "out/a.bin").is_symlink()


def test_names_as_long_as_they_may_be(tmp_path):
  path = tmp_path / f"{'a' * 251}.mp4"
  assert write_atomic(path, b"x").read_bytes() == b"x"


KILLED = """
import os, pathlib, signal, sys
from hiar_jax.files import whole_file
with whole_file(pathlib.Path(sys.argv[1])) as file:
  file.write(b"half")
  file.flush()
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path):
  path = tmp_path / "a.bin"
  ended = subprocess.run([sys.executable, "-c", KILLED, path], cwd=os.getcwd(), check=False)
  assert ended.returncode == -signal.SIGKILL and len(hidden(tmp_path)) == 1
  (tmp_path / ".mine.tmp").write_bytes(b"of somebody else")
  with whole_file(path) as file:
    file.write(b"in use")
    assert len(hidden(tmp_path)) == 2
    files._seen.clear()
    write_atomic(tmp_path / "b.bin", b"b")
    assert len(hidden(tmp_path)) == 2
  assert hidden(tmp_path) == [".mine.tmp"] and path.read_bytes() == b"in use"
