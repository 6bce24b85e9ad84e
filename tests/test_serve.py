"""The server behind the page: what it sends, who waits, and what comes in from people who mean no good."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")

from fake_generation import FakeDecoder  # noqa: E402
from served_page import FakeSource, page  # noqa: E402

from hiar_jax import media, serve, stream  # noqa: E402
from hiar_jax.errors import UserError  # noqa: E402
from hiar_jax.page.showing import Rules  # noqa: E402

PROMPT = "a red circle"


class Tab:
  """What a browser's tab does, by hand. heard: the last of each kind of news; video: the bytes so far."""

  def __init__(self, socket):
    self.socket, self.heard, self.video, self.said = socket, {}, b"", []

  async def say(self, **wish):
    await self.socket.send_str(json.dumps(wish))

  async def until(self, condition, seconds=60, watch=True):
    """Listens until condition(tab); watch: as one that plays all that it gets."""
    async with asyncio.timeout(seconds):
      while not condition(self):
        message = await self.socket.receive()
        if message.type == aiohttp.WSMsgType.BINARY:
          self.video += message.data
        elif message.type == aiohttp.WSMsgType.TEXT:
          news = message.json()
          self.said.append(news)
          self.heard[news["say"]] = news
          if watch and news["say"] == "status" and "seconds" in news:
            await self.say(do="at", seconds=news["seconds"])
        else:
          raise ConnectionError(f"{message.type} {message.data} {message.extra}")

  @property
  def status(self):
    return self.heard.get("status", {"state": "unheard"})

  def is_in(self, *states):
    return self.status["state"] in states


@contextlib.asynccontextmanager
async def tab(server, **headers):
  async with aiohttp.ClientSession() as session:
    async with session.ws_connect(f"{server.url}/watch", headers=headers, max_msg_size=0) as socket:
      yield Tab(socket)


def run(coroutine):
  return asyncio.run(asyncio.wait_for(coroutine, 120))


async def eventually(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    await asyncio.sleep(0.01)
  assert condition()


@pytest.fixture(autouse=True)
def nothing_left():
  yield
  names = [thread.name for thread in threading.enumerate()]
  assert not [name for name in names if name in ("_denoise", "_decode") or name.startswith("showing")]


# ------------------------------------------------------------------------------------------------------------- watching


def test_a_video_is_watched_while_it_is_made(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.until(lambda tab: tab.is_in("idle"))
      await one.say(do="start", prompt=PROMPT, seed=3, seconds=3)
      await one.until(lambda tab: len(tab.video) > 1000)
      assert one.is_in("idle", "starting", "running") and one.heard["begin"]["mime"].startswith('video/mp4; codecs="avc1.')
      await one.until(lambda tab: tab.is_in("finished"))
      assert one.status["target"] == 3 and 24 <= one.status["frames"] < 24 + 3
      assert one.status["latency"] > 0 and [level["sigma"] for level in one.status["levels"]] == [1.0, 0.94, 0.83, 0.62]
      await one.say(do="extend", seconds=1)
      await one.until(lambda tab: tab.status["frames"] >= 32 and tab.is_in("finished"))
      async with aiohttp.ClientSession() as session, session.get(server.url + one.heard["begin"]["clip"]) as answer:
        assert answer.status == 200 and "attachment" in answer.headers["Content-Disposition"]
        return one.video, await answer.read()

  with page(tmp_path) as server:
    seen, fetched = run(visit(server))
  assert seen == fetched
  (tmp_path / "seen.mp4").write_bytes(seen)
  frames, fps, said = media.read_mp4(tmp_path / "seen.mp4", scale=8)
  assert len(frames) in (33, 34, 35) and fps == 8 and said == {"prompt": PROMPT, "seed": "3"}
  assert os.listdir(tmp_path) == ["seen.mp4"]  # the tab is gone, and its video with it


def test_blocks_in_flight_and_a_changed_prompt(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.status.get("blocks", 0) >= 3)
      flight = [level["block"] for level in one.status["levels"]]
      assert flight[0] is None and flight[1:] == sorted(flight[1:], reverse=True)
      await one.say(do="prompt", prompt="a blue zebra", recache=True)
      made = server.source.streams[0].made
      await one.until(lambda tab: "prompt" in tab.heard)
      first = one.heard["prompt"]["block"]
      await one.until(lambda tab: tab.status["prompts"][-1][1] == "a blue zebra")
      assert first <= made + 4 + 8  # ticks may pass between the counting and the asking, as many as the lead allows
      assert one.status["blocks"] - 1 >= first
      assert one.status["prompts"] == [[0, PROMPT], [3 * first / 8, "a blue zebra"]]
      assert one.status["remarks"] == ["the model does not know 'zebra'; it is made without"]
      assert server.source.opened[0].changes == [(first, "a blue zebra", True)]

  with page(tmp_path) as server:
    run(visit(server))


def test_it_is_made_no_further_ahead_than_the_lead(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.status.get("seconds", 0) >= 1, watch=False)
      await asyncio.sleep(0.5)
      await one.say(do="at", seconds=0)
      await one.until(lambda tab: len(tab.said) > 8, watch=False)
      assert 1 <= one.status["seconds"] <= 1 + 3 / 8
      await one.say(do="at", seconds=one.status["seconds"])
      await one.until(lambda tab: tab.status["seconds"] >= 2, watch=False)

  with page(tmp_path, source=FakeSource(0.0), rules=Rules(lead=1.0)) as server:
    run(visit(server))


def test_pause_go_stop(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.status.get("blocks", 0) >= 2)
      await one.say(do="pause")
      await one.until(lambda tab: tab.is_in("paused"))
      before = one.status["frames"]
      await asyncio.sleep(0.4)
      count = len(one.said)
      await one.until(lambda tab: len(tab.said) > count + 3)
      assert one.status["frames"] <= before + 3
      await one.say(do="go")
      await one.until(lambda tab: tab.status["frames"] >= before + 9)
      await one.say(do="stop")
      await one.until(lambda tab: tab.is_in("ended"))
      assert one.status["why"] == "stopped" and server.making() == 0
      async with aiohttp.ClientSession() as session, session.get(server.url + one.heard["begin"]["clip"]) as answer:
        assert answer.status == 200  # it can still be fetched
      await one.say(do="start", prompt="a blue square")
      await one.until(lambda tab: tab.is_in("running") and tab.status["prompt"] == "a blue square")

  with page(tmp_path) as server:
    run(visit(server))
  assert [generation.prompt for generation in server.source.opened] == [PROMPT, "a blue square"]


def test_what_fails_is_said_and_ends_nothing_else(tmp_path, capfd):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt="break")
      await one.until(lambda tab: tab.is_in("ended"))
      assert "block 0 is not finite" in one.status["why"]

      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))

  with page(tmp_path) as server:
    run(visit(server))
  assert "FloatingPointError: block 0 is not finite" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- several viewers


def test_who_comes_later_waits_and_comes_in_when_a_tab_closes(tmp_path):
  async def visit(server):
    async with tab(server) as third:
      async with tab(server) as one:
        async with tab(server) as two:
          for one_of in (one, two, third):
            await one_of.say(do="start", prompt=PROMPT)
          await two.until(lambda tab: tab.is_in("waiting"))
          await third.until(lambda tab: tab.is_in("waiting") and tab.status["before"] == 1)
          await one.until(lambda tab: tab.is_in("running"))
          assert server.making() == 1
        await third.until(lambda tab: tab.status.get("before") == 0)  # the second one gave up
      await third.until(lambda tab: tab.is_in("running"))  # the first one's tab was closed
      await eventually(lambda: server.making() == 1)
    await eventually(lambda: server.making() == 0 and not server.desk.viewers)

  with page(tmp_path, places=1) as server:
    run(visit(server))
  assert len(server.source.opened) == 2 and os.listdir(tmp_path) == []


def test_two_at_once(tmp_path):
  async def visit(server):
    async with tab(server) as one, tab(server) as two:
      await one.say(do="start", prompt=PROMPT, seconds=2)
      await two.say(do="start", prompt="a blue square", seconds=2)
      await asyncio.gather(*(one_of.until(lambda tab: tab.is_in("finished")) for one_of in (one, two)))
      assert one.status["prompt"] == PROMPT and two.status["prompt"] == "a blue square"

  with page(tmp_path) as server:
    run(visit(server))


def test_a_paused_one_gives_way_to_those_who_wait(tmp_path):
  async def visit(server):
    async with tab(server) as one, tab(server) as two:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      await one.say(do="pause")
      await one.until(lambda tab: tab.is_in("paused"))
      await asyncio.sleep(1)
      assert server.making() == 1  # nobody waits: it may stand
      await two.say(do="start", prompt=PROMPT)
      await two.until(lambda tab: tab.is_in("running"))
      await one.until(lambda tab: tab.is_in("ended"))
      assert "others were waiting" in one.status["why"]

  with page(tmp_path, places=1, rules=Rules(hold=0.2)) as server:
    run(visit(server))


def test_who_does_not_watch_loses_the_place(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("ended"), watch=False)
      assert one.status["why"] == "nobody watched for 1 seconds" and server.making() == 0

  with page(tmp_path, rules=Rules(patience=1.0)) as server:
    run(visit(server))


def test_a_viewer_that_vanished_is_noticed(tmp_path):
  """It closes nothing; it just answers no more."""

  async def visit(server):
    with raw_tab(server, json.dumps({"do": "start", "prompt": PROMPT})):
      await eventually(lambda: server.making() == 1)
      await eventually(lambda: not server.desk.viewers and server.making() == 0)

  with page(tmp_path, rules=Rules(patience=1000.0, heartbeat=1.0)) as server:
    run(visit(server))


class Snow(FakeDecoder):
  """Frames that cannot be compressed: a block is some megabytes."""

  def __call__(self, latents, memory):
    return np.random.default_rng(0).integers(0, 256, (3, 480, 480, 3), dtype=np.uint8), None


def test_a_viewer_that_takes_nothing_is_dropped_and_holds_up_nobody(tmp_path):
  """Its socket is full; what it does not take is on the disk, not in memory."""

  async def visit(server):
    with raw_tab(server, json.dumps({"do": "start", "prompt": PROMPT})):
      await eventually(lambda: server.making() == 1)
      (viewer,) = server.desk.viewers
      showing = viewer.showing
      async with tab(server) as one:
        await one.say(do="start", prompt=PROMPT, seconds=1)
        await one.until(lambda tab: tab.is_in("finished"))
        await eventually(lambda: viewer not in server.desk.viewers and showing.is_over)
      assert showing.why == "the viewer was too slow to take it"

  source = FakeSource(0.01, decoder=Snow)
  source.scale = 1
  with page(tmp_path, rules=Rules(patience=3.0, lead=1000.0, heartbeat=1000.0), source=source) as server:
    run(visit(server))


@contextlib.contextmanager
def raw_tab(server, text):
  """A socket that shakes hands, asks, and never reads again."""
  raw = socket.create_connection(("127.0.0.1", server.port))
  raw.sendall(f"GET /watch HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
              "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())  # fmt: skip
  mask, data = b"abcd", text.encode()
  raw.sendall(bytes([0x81, 0x80 | len(data)]) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))
  with raw:
    yield


def test_a_video_is_at_most_so_long(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("ended"))
      assert "at most 1 seconds" in one.status["why"] and one.status["frames"] in (8, 9, 10)

  with page(tmp_path, rules=Rules(longest=1.0)) as server:
    run(visit(server))


def test_videos_are_kept_where_that_is_wanted(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))

  with page(tmp_path, keep=True) as server:
    run(visit(server))
  (path,) = tmp_path.glob("*.mp4")
  assert len(media.read_mp4(path)[0]) >= 8


# ----------------------------------------------------------------------------------------------------------- no good will


HOSTILE = [
  ("x" * 10_000_000, "a message of 10000000 characters"),
  (json.dumps({"do": "prompt", "prompt": "x" * 5000}), "a prompt of 5000 characters; at most 2000"),
  ("not json", "expected a JSON object"), ("[" * 60_000, "expected a JSON object"), ("[]", 'with "do"'), ("{}", 'with "do"'),
  ('{"do": 3}', 'with "do"'), ('{"do": "__class__"}', "there is no '__class__'"), ('{"do": "carry_out"}', "there is no 'carry_out'"),
  ('{"do": "prompt", "prompt": 3}', "prompt: expected a text"), ('{"do": "prompt"}', "prompt: expected a text"),
  ('{"do": "prompt", "prompt": "\\ud800"}', "half a pair"), ('{"do": "prompt", "prompt": "a", "recache": 1}', "true or false"),
  ('{"do": "start", "prompt": "a", "seed": -1}', "seed"), ('{"do": "start", "prompt": "a", "seed": 1.5}', "seed"),
  ('{"do": "start", "prompt": "a", "seconds": "many"}', "seconds"), ('{"do": "start", "prompt": "a", "seconds": 1e9}', "seconds"),
  ('{"do": "start", "prompt": ["a"]}', "prompt"), ('{"do": "extend"}', "seconds"), ('{"do": "extend", "seconds": NaN}', "seconds"),
  ('{"do": "at", "seconds": "now"}', "seconds"), ('{"do": "at", "seconds": -1}', "seconds"), ('{"do": "at", "seconds": true}', "seconds"),
]  # fmt: skip


def test_wishes_that_cannot_be_granted_are_answered_and_change_nothing(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      for text, why in HOSTILE:
        one.heard.pop("refused", None)
        await one.socket.send_str(text)
        await one.until(lambda tab: "refused" in tab.heard)
        assert why in one.heard["refused"]["why"], text[:60]
      await one.socket.send_bytes(b"\0" * 1000)
      await one.until(lambda tab: tab.heard["refused"]["why"].startswith("expected a text"))
      frames = one.status["frames"]
      await one.until(lambda tab: tab.is_in("running") and tab.status["frames"] > frames + 6)
      assert one.status["prompt"] == PROMPT

  with page(tmp_path) as server:
    run(visit(server))
  assert len(server.source.opened) == 1 and server.source.opened[0].changes == []


def test_wishes_without_a_video(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      for does in ({"do": "prompt", "prompt": "a"}, {"do": "pause"}, {"do": "go"}, {"do": "extend", "seconds": 3}):
        one.heard.pop("refused", None)
        await one.say(**does)
        await one.until(lambda tab: "refused" in tab.heard)
        assert "start a video first" in one.heard["refused"]["why"]
      await one.say(do="stop")
      await one.say(do="at", seconds=3)
      count = len(one.said)
      await one.until(lambda tab: len(tab.said) > count + 3)
      assert one.is_in("idle")

  with page(tmp_path) as server:
    run(visit(server))


def test_a_hundred_sockets(tmp_path):
  async def visit(server):
    async with tab(server) as one, aiohttp.ClientSession() as session:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
      answers = await asyncio.gather(*(session.ws_connect(f"{server.url}/watch") for _ in range(100)), return_exceptions=True)
      taken = [answer for answer in answers if not isinstance(answer, Exception)]
      assert len(taken) == 7 and {answer.status for answer in answers if isinstance(answer, Exception)} == {503}
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 6)
      for other in taken:
        await other.close()
      for other in silent:
        other.close()
      await eventually(lambda: len(server.desk.viewers) == 1)

  with page(tmp_path, viewers=8) as server:
    run(visit(server))
  assert len(server.source.opened) == 1


def ask(server, target, headers=()):
  """(status, body) of a GET whose target goes out as it is written."""
  lines = [f"GET {target} HTTP/1.1", *(headers or [f"Host: 127.0.0.1:{server.port}"]), "Connection: close", "", ""]
  with socket.create_connection(("127.0.0.1", server.port)) as raw:
    raw.sendall("\r\n".join(lines).encode())
    answer = b""
    while part := raw.recv(65536):
      answer += part
  head, _, body = answer.partition(b"\r\n\r\n")
  return int(head.split()[1]), head.decode(), body.decode(errors="replace")


def test_only_its_own_files_can_be_fetched(tmp_path):
  (tmp_path / "secret.mp4").write_bytes(b"secret")
  with page(tmp_path) as server:
    for target in (
      "/clips/secret.mp4", "/clips/../secret.mp4", "/clips/%2e%2e%2fsecret.mp4", "/clips/..%2f..%2fetc%2fpasswd", "/clips/", "/../serve.py",
      "/static/index.html", "/app.py", "//etc/passwd", "/clips//etc/passwd", "/clips/%00", "/index.html",
    ):  # fmt: skip
      status, _, body = ask(server, target)
      assert status == 404 and "secret" not in body and "root:" not in body, target
    for target, part in (("/", "<title>hiar_jax</title>"), ("/page.js", "MediaSource"), ("/page.css", "--accent")):
      status, head, body = ask(server, target)
      assert status == 200 and part in body and "nosniff" in head and "default-src 'self'" in head


@pytest.mark.parametrize("headers, status", [
  (["Host: localhost:{port}"], 200), (["Host: [::1]:{port}"], 200), (["Host: box.lan:{port}"], 200),
  (["Host: evil.example"], 403), (["Host: evil.example:{port}"], 403), (["Host: localhost.evil.example"], 403), (["Host: "], 403),
  (["Host: 127.0.0.1:{port}", "Origin: http://evil.example"], 403), (["Host: 127.0.0.1:{port}", "Origin: null"], 403),
  (["Host: 127.0.0.1:{port}", "Origin: http://127.0.0.1:9"], 403), (["Host: 127.0.0.1:{port}", "Origin: http://127.0.0.1:{port}"], 200),
])  # fmt: skip
def test_other_names_and_other_sites_are_turned_away(tmp_path_factory, headers, status, server):
  assert ask(server, "/", [line.format(port=server.port) for line in headers])[0] == status


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  with page(tmp_path_factory.mktemp("clips"), hosts=frozenset({"box.lan"})) as server:
    yield server


def test_another_site_gets_no_socket(tmp_path):
  async def visit(server):
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
      with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        async with tab(server, **headers):
          pass
    async with tab(server, Origin=server.url) as one:
      await one.until(lambda tab: tab.is_in("idle"))

  with page(tmp_path) as server:
    run(visit(server))


# ------------------------------------------------------------------------------------------------------------ the command


def test_a_port_in_use_is_one_line():
  with serve.listen("127.0.0.1", 0) as first:
    port = first.getsockname()[1]
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use; give another one, as --port={port + 1}"):
      serve.listen("127.0.0.1", port)
  with pytest.raises(UserError, match="cannot listen on 192.0.2.1"):
    serve.listen("192.0.2.1", 0)


def test_a_port_in_use_is_known_before_anything_is_loaded(monkeypatch):
  monkeypatch.setattr(stream, "open_source", lambda _: pytest.fail("the model is loaded before the port is known to be free"))
  with serve.listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="is in use"):
    serve.start(stream.Options(workdir="nowhere"), serve.Options(port=first.getsockname()[1]))


def test_the_page_needs_its_extra(monkeypatch):
  monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'hiar_jax\[serve\]'"):
    serve.check_installed()


def test_colours_come_through(tmp_path):
  """What is played is what was made."""
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))
      return one.video

  with page(tmp_path) as server:
    (tmp_path / "seen.mp4").write_bytes(run(visit(server)))
  from test_stream_api import expected

  frames = media.read_mp4(tmp_path / "seen.mp4", scale=8)[0]
  assert np.abs(frames.astype(int) - expected([PROMPT] * 4)[: len(frames)]).mean() < 4
