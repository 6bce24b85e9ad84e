"""What a client hands in to start from: a picture, the end of a video, and whatever else somebody
may send instead.
"""

import asyncio
import contextlib
import errno
import io
import json
import os
import pathlib
import tempfile
import threading
import time

import av
import numpy as np
from PIL import Image
import pytest

aiohttp = pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")

from hiar_jax.errors import UserError
from hiar_jax.serving import app, uploads
from hiar_jax.video.isolated_reader import IsolatedReader, Limits
from hiar_jax.video.mp4 import read_metadata, write_mp4
from tests.helpers.browser_tab import nothing_left, run, tab  # noqa: F401
from tests.helpers.served_page import FakeSource, page

PROMPT = "a red circle"
RED = (220, 30, 30)
READER = IsolatedReader()


def picture(kind="PNG", size=(40, 20), mode="RGB", colour=RED, **options) -> bytes:
  file = io.BytesIO()
  Image.new(mode, size, colour).save(file, kind, **options)
  return file.getvalue()


def video(folder, frames=9, fps=8, size=(16, 16), name="a.mp4") -> bytes:
  """Frame i is grey i * 10."""
  grey = (np.arange(frames) * 10 % 256).astype(np.uint8)[:, None, None, None]
  return write_mp4(folder / name, np.broadcast_to(grey, (frames, *size, 3)), fps).read_bytes()


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path_factory):
  """Whatever was handed in is gone from the disk."""
  place = tmp_path_factory.mktemp("temporary")
  monkeypatch.setattr(tempfile, "tempdir", str(place))
  yield
  assert os.listdir(place) == []


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_read(kind):
  frames, said = uploads.read(FakeSource(), READER, "C:\\cats\\../red cat.png", picture(kind))
  assert (frames.kind, frames.path, frames.pixels.shape) == (
    "image",
    pathlib.Path("red cat.png"),
    (1, 16, 16, 3),
  )
  assert np.abs(frames.pixels.astype(int) - RED).max() <= 8
  assert said == "red cat.png: 20x40, scaled by 0.8 to cover 16x16, 50% of its width cropped"


def test_the_end_of_a_video_is_read(tmp_path):
  frames, said = uploads.read(FakeSource(), READER, "start.mp4", video(tmp_path))
  assert (
    frames.kind == "video" and np.abs(frames.pixels[:, 3, 3, 0] - 10.0 * np.arange(3, 9)).max() <= 2
  )
  assert said == "start.mp4: 16x16, the last 6 of 9 frames"


def test_a_video_of_another_kind_is_read(tmp_path):
  """Matroska, from this machine's FFmpeg."""
  file = io.BytesIO()
  with av.open(file, "w", format="matroska") as container:
    stream = container.add_stream("libx264", rate=8)
    stream.width = stream.height = 16
    for _ in range(3):
      container.mux(
        stream.encode(
          av.VideoFrame.from_ndarray(np.full((16, 16, 3), 90, np.uint8), format="rgb24")
        )
      )
    container.mux(stream.encode())
  assert uploads.read(FakeSource(), READER, "a.mkv", file.getvalue())[0].pixels.shape == (
    3,
    16,
    16,
    3,
  )


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
  "content, why",
  [
    (b"", "neither"),
    (b"a cat", "neither"),
    (b"\x89PN", "neither"),
    (b"RIFF\0\0\0\0WAVEfmt ", "neither"),
    (EPS, "neither"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither"),
    (b"ffconcat version 1.0\nfile secret.mp4\n", "neither"),
    (PLAYLIST % b"secret.mp4", "neither"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture, .*save it as JPEG"),
    (b"\0\0\0\0ftypisom" + PLAYLIST % b"secret.mp4", "is a damaged video, or none"),
    (picture()[:30], "damaged"),
    (picture()[:-20] + b"x" * 20, "damaged"),
    (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "damaged picture, or none"),
    (picture("JPEG", (300, 300))[:-300], "damaged"),
    (b"\x1a\x45\xdf\xa3" + bytes(500), "is a damaged video, or none"),
  ],
  ids=range(15),
)
def test_what_cannot_be_read_is_one_line(content, why):
  with pytest.raises(UserError, match=why) as error:
    uploads.read(FakeSource(), READER, "cat.png", content)
  said = str(error.value)
  assert (
    said.startswith("cat.png ")
    and "\n" not in said
    and tempfile.gettempdir() not in said
    and "start" not in said
  ), said


def test_no_other_file_is_opened_by_way_of_it(tmp_path, monkeypatch):
  """A list of files for FFmpeg is none of the kinds that are taken, and is never given to it."""
  video(tmp_path, name="secret.mp4")
  secret = str(tmp_path / "secret.mp4").encode()
  monkeypatch.setattr(FakeSource, "read_start", lambda *_: pytest.fail("it was read"))
  for content in (PLAYLIST % secret, b"ffconcat version 1.0\nfile '%s'\n" % secret):
    with pytest.raises(UserError, match="neither"):
      uploads.read(FakeSource(), READER, "list.mp4", content)


@pytest.mark.parametrize(
  "limits, why",
  [
    (
      Limits(frames=8),
      "long.mp4 is too long: of its size 8 frames are read, 120 seconds at most; cut it first",
    ),
    (Limits(video_seconds=1.0), "too long: of its size 3600 frames are read, 1 seconds at most"),
    (Limits(video_pixels=8 * 256), "of its size 8 frames"),
  ],
  ids=range(3),
)
def test_a_video_that_would_take_long_is_refused(tmp_path, limits, why):
  with pytest.raises(UserError, match=why):
    uploads.read(FakeSource(), IsolatedReader(limits), "long.mp4", video(tmp_path))


def test_a_video_at_the_limit_is_read(tmp_path):
  reader = IsolatedReader(Limits(frames=9, video_seconds=9 / 8))
  assert len(uploads.read(FakeSource(), reader, "a.mp4", video(tmp_path))[0].pixels) == 6


def test_a_picture_of_too_many_pixels_is_refused():
  with pytest.raises(
    UserError,
    match="a.png has 9000 x 9000 pixels, at most 64 million are read; scale it down first",
  ):
    uploads.read(FakeSource(), READER, "a.png", picture(size=(9000, 9000), mode="1", colour=0))


# -------------------------------------------------------------------------------------- on the page


def test_a_video_starts_from_a_picture(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.hand_in(picture(), prompt=PROMPT, seed=3, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))
      assert one.heard["given"]["done"].startswith("cat.png: 20x40, scaled by 0.8")
      assert one.status["frames"] == 1 + 3 * 3 and one.status["blocks"] == 3
      await one.say(do="start", prompt=PROMPT, seconds=1)  # from nothing
      await one.until(lambda tab: tab.is_in("finished") and tab.status["frames"] == 9)
      return one.video

  with page(tmp_path) as server:
    (tmp_path / "seen.mp4").write_bytes(run(visit(server)))
  assert read_metadata(tmp_path / "seen.mp4")["start"] == "image cat.png"
  first, second = server.source.starts
  assert (first.kind, first.pixels.shape, second) == ("image", (1, 16, 16, 3), None)


def test_who_waits_keeps_the_start(tmp_path):
  async def visit(server):
    async with tab(server) as two:
      async with tab(server) as one:
        await one.say(do="start", prompt=PROMPT)
        await one.until(lambda tab: tab.is_in("running"))
        await two.hand_in(video(tmp_path), name="a.mp4", prompt=PROMPT)
        await two.until(lambda tab: tab.is_in("waiting"))
      await two.until(lambda tab: tab.is_in("running"))

  with page(tmp_path / "clips", max_generations=1) as server:
    (tmp_path / "clips").mkdir()
    run(visit(server))
  assert [start and start.kind for start in server.source.starts] == [None, "video"]


def message(content, **wish):
  return (
    json.dumps({"do": "start", "prompt": "a", "name": "cat.png", **wish}).encode() + b"\n" + content
  )


WRONG = [
  (b"\0" * 1000, "expected a JSON"),
  (b"\n" + picture(), "expected a JSON object"),
  (b"\xff\n" + picture(), "expected a JSON object"),
  (b"[]\n" + picture(), 'with "do"'),
  (b"x" * 10_000_000, "a message of 10000000 characters"),
  (message(b""), "cat.png is neither"),
  (message(b"x" * 10_000_000), "cat.png is neither"),
  (message(picture()[:-30]), "damaged"),
  (message(picture(), name=3), "name: expected"),
  (message(picture(), name=None), "name: expected a text"),
  (message(picture(), name="\ud800"), "half a pair"),
  (message(picture(), name="x" * 3000), "a name of 3000 characters"),
  (message(picture(), prompt=3), "prompt: expected a text"),
  (message(picture(), seed=-1), "seed"),
  (message(picture(), do="prompt"), 'a file comes with "start" alone'),
  (message(picture(), do="at", seconds=1), 'a file comes with "start" alone'),
  (message(PLAYLIST % b"/etc/passwd"), "neither"),
  (message(b"text", name="../../etc/passwd"), "passwd is neither"),
  (message(b"text", name="/"), "the start is neither"),
]


def test_what_cannot_be_started_from_is_answered_and_changes_nothing(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      for content, why in WRONG:
        one.heard.pop("refused", None)
        await one.socket.send_bytes(content)
        await one.until(lambda tab: "refused" in tab.heard)
        said = one.heard["refused"]["why"]
        assert why in said and "\n" not in said and tempfile.gettempdir() not in said, (
          content[:60],
          said,
        )
      frames = one.status["frames"]
      await one.until(lambda tab: tab.is_in("running") and tab.status["frames"] > frames + 6)
      assert one.status["prompt"] == PROMPT

  with page(tmp_path) as server:
    run(visit(server))
  assert (
    len(server.source.opened) == 1 and server.source.starts == [None] and os.listdir(tmp_path) == []
  )


def test_a_tag_that_is_not_utf8_is_passed_over(tmp_path):
  content = write_mp4(
    tmp_path / "a.mp4", np.zeros((9, 16, 16, 3), np.uint8), 8, {"prompt": "Cafe!!"}
  ).read_bytes()
  content = content.replace(b"Cafe!!", b"Caf\xe9!!")
  assert uploads.read(FakeSource(), READER, "a.mp4", content)[0].pixels.shape == (6, 16, 16, 3)


def test_whatever_is_raised_is_answered_and_changes_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise AttributeError("no attribute 'width' in /srv/secret")

  monkeypatch.setattr(uploads, "read", fail)

  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      await one.hand_in(picture(), prompt=PROMPT)
      await one.until(lambda tab: "refused" in tab.heard)
      said = one.heard["refused"]["why"]
      assert said == "this failed on the server (AttributeError)"
      frames = one.status["frames"]
      await one.until(lambda tab: tab.is_in("running") and tab.status["frames"] > frames + 6)

  with page(tmp_path) as server:
    run(visit(server))
  assert len(server.source.opened) == 1


def test_a_full_disk_is_one_line(monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "/srv/secret/start")

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  with pytest.raises(UserError) as error:
    uploads.read(FakeSource(), READER, "cat.png", picture())
  assert str(error.value).startswith(
    "cat.png cannot be read (the disk for temporary files is full); "
  )


def test_a_server_that_stops_ends_what_is_read(tmp_path):
  """A JPEG that would take its reader long; what was stored of it is gone (nothing_stays)."""
  content = picture("JPEG", (2000, 2000), progressive=True)
  last = content.rindex(b"\xff\xda")
  content = content[:last] + content[last:-2] * 50_000 + content[-2:]

  async def visit(server):
    async with tab(server) as one:
      await one.hand_in(content, prompt=PROMPT)
      while not server.queue.reader._running:
        await asyncio.sleep(0.01)
      (process,) = server.queue.reader._running
      began = time.monotonic()
      await asyncio.to_thread(stack.close)  # the server stops while the tab is open
      process.wait(5)
      assert time.monotonic() - began < 10
      while os.listdir(tempfile.gettempdir()):  # a thread removes what it stored
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.01)

  with contextlib.ExitStack() as stack:
    run(visit(stack.enter_context(page(tmp_path))))


def test_what_is_handed_in_cannot_be_fetched(tmp_path, monkeypatch):
  """Not even while it is read."""
  seen = []

  def look(self, path, kind, name, reader):
    seen.extend([path, path.read_bytes()])
    raise UserError(f"{path} is enough")

  monkeypatch.setattr(FakeSource, "read_start", look)

  async def visit(server):
    async with tab(server) as one, aiohttp.ClientSession() as session:
      await one.hand_in(picture(), prompt=PROMPT)
      await one.until(lambda tab: "refused" in tab.heard)
      assert one.heard["refused"]["why"] == "cat.png is enough"
      for name in ("cat.png", "start", seen[0].parent.name, f"{seen[0].parent.name}/start"):
        async with session.get(f"{server.url}/clips/{name}") as answer:
          assert answer.status == 404

  with page(tmp_path) as server:
    run(visit(server))
  assert seen[1] == picture() and not seen[0].exists() and tmp_path not in seen[0].parents


def test_a_file_that_is_too_large_closes_its_own_socket_alone(tmp_path):
  async def visit(server):
    async with tab(server) as one, tab(server) as two:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      with pytest.raises(ConnectionError):  # told why, or cut off in the midst of sending
        await two.hand_in(b"x" * app.MAX_MESSAGE, prompt=PROMPT)
        await two.until(lambda tab: False)
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 6)

  with page(tmp_path) as server:
    run(visit(server))
  assert len(server.source.opened) == 1


def test_two_are_read_at_once_and_no_more(tmp_path, monkeypatch):
  """However many clients hand something in."""
  reading, most, release = [], [], threading.Event()

  def look(self, path, kind, name, reader):
    reading.append(name)
    most.append(len(reading))
    release.wait(60)
    reading.remove(name)
    raise UserError("enough")

  monkeypatch.setattr(FakeSource, "read_start", look)

  async def visit(server):
    async with tab(server) as one, tab(server) as two, tab(server) as three:
      for i, each in enumerate((one, two, three)):
        await each.hand_in(picture(), name=f"{i}.png", prompt=PROMPT)
      await asyncio.sleep(0.5)
      assert len(reading) == 2
      release.set()
      for each in (one, two, three):
        await each.until(lambda tab: "refused" in tab.heard)

  with page(tmp_path) as server:
    run(visit(server))
  assert max(most) == 2 and len(most) == 3
