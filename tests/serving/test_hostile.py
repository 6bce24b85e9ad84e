"""What comes in to the page's server from people who mean no good leaves the running generation
alone.
"""

import asyncio
import json
import socket

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")

from hiar_jax.serving.session import Limits
from tests.helpers.browser_tab import eventually, nothing_left, run, tab  # noqa: F401
from tests.helpers.served_page import FakeSource, page

PROMPT = "a red circle"

HOSTILE = [
  ("x" * 10_000_000, "a message of 10000000 characters"),
  (json.dumps({"do": "prompt", "prompt": "x" * 5000}), "a prompt of 5000 characters; at most 2000"),
  ("not json", "expected a JSON object"),
  ("[" * 60_000, "expected a JSON object"),
  ("[]", 'with "do"'),
  ("{}", 'with "do"'),
  ('{"do": 3}', 'with "do"'),
  ('{"do": "__class__"}', "there is no '__class__'"),
  ('{"do": "carry_out"}', "there is no 'carry_out'"),
  ('{"do": "prompt", "prompt": 3}', "prompt: expected a text"),
  ('{"do": "prompt"}', "prompt: expected a text"),
  ('{"do": "prompt", "prompt": "\\ud800"}', "half a pair"),
  ('{"do": "prompt", "prompt": "a", "recache": 1}', "true or false"),
  ('{"do": "start", "prompt": "a", "seed": -1}', "seed"),
  ('{"do": "start", "prompt": "a", "seed": 1.5}', "seed"),
  ('{"do": "start", "prompt": "a", "seconds": "many"}', "seconds"),
  ('{"do": "start", "prompt": "a", "seconds": 1e9}', "seconds"),
  ('{"do": "start", "prompt": ["a"]}', "prompt"),
  ('{"do": "extend"}', "seconds"),
  ('{"do": "extend", "seconds": NaN}', "seconds"),
  ('{"do": "at", "seconds": "now"}', "seconds"),
  ('{"do": "at", "seconds": -1}', "seconds"),
  ('{"do": "at", "seconds": true}', "seconds"),
]


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
      await one.until(lambda tab: tab.heard["refused"]["why"].startswith("expected a JSON object"))
      frames = one.status["frames"]
      await one.until(lambda tab: tab.is_in("running") and tab.status["frames"] > frames + 6)
      assert one.status["prompt"] == PROMPT

  with page(tmp_path) as server:
    run(visit(server))
  assert len(server.source.opened) == 1 and server.source.opened[0].changes == []


def test_who_claims_to_have_seen_what_is_not_made_gets_no_more_than_the_lead(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.status.get("seconds", 0) >= 1, watch=False)
      await one.say(do="at", seconds=1e9)
      await asyncio.sleep(1)
      (client,) = server.queue.clients
      assert client.session.status()["seconds"] <= 2 * (1 + 3 / 8)

  with page(tmp_path, source=FakeSource(0.0), limits=Limits(buffer_seconds=1.0)) as server:
    run(visit(server))


def test_wishes_without_a_video(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      for does in (
        {"do": "prompt", "prompt": "a"},
        {"do": "pause"},
        {"do": "go"},
        {"do": "extend", "seconds": 3},
      ):
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
      answers = await asyncio.gather(
        *(session.ws_connect(f"{server.url}/watch") for _ in range(100)), return_exceptions=True
      )
      taken = [answer for answer in answers if not isinstance(answer, Exception)]
      assert len(taken) == 7 and {
        answer.status for answer in answers if isinstance(answer, Exception)
      } == {503}
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 6)
      for other in taken:
        await other.close()
      for other in silent:
        other.close()
      await eventually(lambda: len(server.queue.clients) == 1)

  with page(tmp_path, max_clients=8) as server:
    run(visit(server))
  assert len(server.source.opened) == 1


def ask(server, target, headers=()):
  """(status, body) of a GET whose target goes out as it is written."""
  lines = [
    f"GET {target} HTTP/1.1",
    *(headers or [f"Host: 127.0.0.1:{server.port}"]),
    "Connection: close",
    "",
    "",
  ]
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
      "/clips/secret.mp4",
      "/clips/../secret.mp4",
      "/clips/%2e%2e%2fsecret.mp4",
      "/clips/..%2f..%2fetc%2fpasswd",
      "/clips/",
      "/../serve.py",
      "/static/index.html",
      "/app.py",
      "//etc/passwd",
      "/clips//etc/passwd",
      "/clips/%00",
      "/index.html",
    ):
      status, _, body = ask(server, target)
      assert status == 404 and "secret" not in body and "root:" not in body, target
    for target, part in (
      ("/", "<title>hiar_jax</title>"),
      ("/page.js", "MediaSource"),
      ("/page.css", "--accent"),
    ):
      status, head, body = ask(server, target)
      assert status == 200 and part in body and "nosniff" in head and "default-src 'self'" in head


@pytest.mark.parametrize(
  "headers, status",
  [
    (["Host: localhost:{port}"], 200),
    (["Host: [::1]:{port}"], 200),
    (["Host: box.lan:{port}"], 200),
    (["Host: evil.example"], 403),
    (["Host: evil.example:{port}"], 403),
    (["Host: localhost.evil.example"], 403),
    (["Host: "], 403),
    (["Host: 127.0.0.1:{port}", "Origin: http://evil.example"], 403),
    (["Host: 127.0.0.1:{port}", "Origin: null"], 403),
    (["Host: 127.0.0.1:{port}", "Origin: http://127.0.0.1:9"], 403),
    (["Host: 127.0.0.1:{port}", "Origin: http://127.0.0.1:{port}"], 200),
  ],
)
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
