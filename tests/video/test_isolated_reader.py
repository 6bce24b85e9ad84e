"""A process that reads one untrusted file: its limits, and its end."""

from fractions import Fraction
import io
import os
import subprocess
import sys
import threading
import time

import av
import numpy as np
from PIL import Image
import pytest

from hiar_jax.errors import UserError
from hiar_jax.video import conditioning_files, mp4
from hiar_jax.video.isolated_reader import IsolatedReader, Limits


def many_scans(path, count, size=2000):
  """A progressive JPEG whose last scan, of 12 bytes, is there `count` times."""
  file = io.BytesIO()
  Image.new("RGB", (size, size), (200, 10, 10)).save(file, "JPEG", progressive=True)
  content = file.getvalue()
  last = content.rindex(b"\xff\xda")
  path.write_bytes(content[:last] + content[last:-2] * count + content[-2:])
  return path


def test_it_reads_what_this_process_reads(tmp_path):
  frames = np.random.default_rng(0).integers(0, 256, (7, 16, 24, 3), dtype=np.uint8)
  film = mp4.write_mp4(tmp_path / "a.mp4", frames, 8)
  Image.fromarray(frames[0]).save(tmp_path / "a.png")
  for name, arguments in (("image", (16, 16)), ("video", (16, 16, 8.0, 4))):
    path = film if name == "video" else tmp_path / "a.png"
    found, said = getattr(IsolatedReader(), f"read_{name}")(path, *arguments)
    wanted, message = getattr(conditioning_files, f"read_{name}")(path, *arguments)
    np.testing.assert_array_equal(found, wanted)
    assert said == message and found.flags.writeable


def test_it_imports_no_jax():
  code = "import sys, hiar_jax.video.isolated_reader; print('jax' in sys.modules)"
  assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_time_is_limited(tmp_path):
  path = many_scans(tmp_path / "scans.jpg", 5000)
  began = time.monotonic()
  with pytest.raises(UserError, match="scans.jpg takes more than 1 seconds to read"):
    IsolatedReader(Limits(seconds=1.0)).read_image(path, 16, 16)
  assert time.monotonic() - began < 10


def test_memory_is_limited(tmp_path):
  path = tmp_path / "large.png"
  Image.new("RGB", (8000, 8000)).save(path, compress_level=1)
  with pytest.raises(UserError, match="large.png .* memory"):
    IsolatedReader(Limits(memory=512 * 2**20)).read_image(path, 16, 16)


def test_a_small_header_hides_no_large_frames(tmp_path):
  """MOV with PNGs in it, of which only the first has the size that the header says."""
  path = tmp_path / "hidden.mov"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("png", rate=8)
    stream.width = stream.height = 64
    stream.pix_fmt = "rgb24"
    for i, size in enumerate((64, 9000, 9000)):
      file = io.BytesIO()
      Image.new("1", (size, size)).save(file, "PNG")
      packet = av.Packet(file.getvalue())
      packet.stream, packet.pts, packet.dts = stream, i, i
      packet.time_base, packet.is_keyframe = Fraction(1, 8), True
      container.mux(packet)
  with pytest.raises(UserError, match="hidden.mov cannot be used .frame . has 9000 x 9000 pixels"):
    IsolatedReader().read_video(path, 16, 16, 8.0)


def test_closing_ends_what_is_being_read(tmp_path):
  path, reader, raised = many_scans(tmp_path / "scans.jpg", 50_000), IsolatedReader(), []

  def read():
    try:
      reader.read_image(path, 16, 16)
    except UserError as error:
      raised.append(str(error))

  thread = threading.Thread(target=read)
  thread.start()
  while not reader._running:
    time.sleep(0.01)
  (process,) = reader._running
  time.sleep(0.5)
  assert thread.is_alive()
  reader.close()
  thread.join(5)
  assert raised == [f"{path} was not read: the server stops"]
  with pytest.raises(ProcessLookupError):
    os.kill(process.pid, 0)
  with pytest.raises(UserError, match="the server stops"):
    reader.read_image(path, 16, 16)
