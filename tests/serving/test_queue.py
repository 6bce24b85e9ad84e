"""Several clients of the page: who waits, who comes in, and who gives way or is dropped."""

import asyncio
import contextlib
import json
import os
import socket

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")

from hiar_jax.serving.session import Limits
from tests.helpers.browser_tab import eventually, nothing_left, run, tab  # noqa: F401
from tests.helpers.fake_generation import FakeDecoder
from tests.helpers.served_page import FakeSource, page

PROMPT = "a red circle"


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
    await eventually(lambda: server.making() == 0 and not server.queue.clients)

  with page(tmp_path, max_generations=1) as server:
    run(visit(server))
  assert len(server.source.opened) == 2 and os.listdir(tmp_path) == []


def test_who_asked_first_comes_first(tmp_path):
  async def visit(server):
    async with tab(server) as one, tab(server) as two, tab(server) as three:
      for i, each in enumerate((one, two, three)):
        await each.say(do="start", prompt=str(i))
        await each.until(lambda tab: tab.is_in("running", "waiting"))
      await three.until(lambda tab: tab.status.get("before") == 1)
      for each, later in ((one, two), (two, three)):
        await each.say(do="stop")
        await later.until(lambda tab: tab.is_in("running"))

  with page(tmp_path, max_generations=1) as server:
    run(visit(server))
  assert [generation.prompt for generation in server.source.opened] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_paused_one_may_stand_for_as_long_as_nobody_waits(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      await one.say(do="pause")
      await asyncio.sleep(2.5)
      await one.say(do="go")
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 6)

  with page(tmp_path, limits=Limits(idle_timeout=1.0, grace=0.2)) as server:
    run(visit(server))


@pytest.mark.slow
def test_one_that_was_extended_stands_no_more(tmp_path):
  """It had been finished for longer than it may when others wait; from then on it is counted
  anew.
  """

  async def visit(server):
    async with tab(server) as one, tab(server) as two:
      await one.say(do="start", prompt=PROMPT, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))
      await asyncio.sleep(1.5)
      await one.say(do="extend", seconds=1000)
      await one.until(lambda tab: tab.is_in("running") and tab.status["frames"] > 12)
      await two.say(do="start", prompt=PROMPT)
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 24)  # a second and more
      await two.until(lambda tab: tab.is_in("waiting"))
      assert one.is_in("running")

  with page(tmp_path, max_generations=1, limits=Limits(grace=1.0)) as server:
    run(visit(server))


def test_two_at_once(tmp_path):
  async def visit(server):
    async with tab(server) as one, tab(server) as two:
      await one.say(do="start", prompt=PROMPT, seconds=2)
      await two.say(do="start", prompt="a blue square", seconds=2)
      await asyncio.gather(
        *(one_of.until(lambda tab: tab.is_in("finished")) for one_of in (one, two))
      )
      assert one.status["prompt"] == PROMPT and two.status["prompt"] == "a blue square"

  with page(tmp_path) as server:
    run(visit(server))


@pytest.mark.slow
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

  with page(tmp_path, max_generations=1, limits=Limits(grace=0.2)) as server:
    run(visit(server))


def test_who_does_not_watch_loses_the_place(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("ended"), watch=False)
      assert one.status["why"] == "nobody watched for 1 seconds" and server.making() == 0

  with page(tmp_path, limits=Limits(idle_timeout=1.0)) as server:
    run(visit(server))


@pytest.mark.slow
def test_a_viewer_that_vanished_is_noticed(tmp_path):
  """It closes nothing; it just answers no more."""

  async def visit(server):
    with raw_tab(server, json.dumps({"do": "start", "prompt": PROMPT})):
      await eventually(lambda: server.making() == 1)
      await eventually(lambda: not server.queue.clients and server.making() == 0)

  with page(tmp_path, limits=Limits(idle_timeout=1000.0, heartbeat=1.0)) as server:
    run(visit(server))


class Snow(FakeDecoder):
  """Frames that cannot be compressed: a block is some megabytes."""

  def __call__(self, latents, memory):
    return np.random.default_rng(0).integers(0, 256, (3, 480, 480, 3), dtype=np.uint8), None


def test_a_viewer_that_takes_nothing_is_dropped_and_holds_up_nobody(tmp_path):
  """Its socket is full; what it does not take is on the disk, not in memory."""

  async def visit(server):
    with raw_tab(server, json.dumps({"do": "start", "prompt": PROMPT})):
      await eventually(lambda: any(client.session for client in server.queue.clients))
      (client,) = server.queue.clients
      session = client.session
      async with tab(server) as one:
        await one.say(do="start", prompt=PROMPT, seconds=1)
        await one.until(lambda tab: tab.is_in("finished"))
        await eventually(lambda: client not in server.queue.clients and session.is_over)
      assert session.why == "the viewer was too slow to take it"

  source = FakeSource(0.01, decoder=Snow)
  source.scale = 1
  with page(
    tmp_path,
    limits=Limits(idle_timeout=1.5, buffer_seconds=1000.0, heartbeat=1000.0),
    source=source,
  ) as server:
    run(visit(server))


@contextlib.contextmanager
def raw_tab(server, text):
  """A socket that shakes hands, asks, and never reads again."""
  raw = socket.create_connection(("127.0.0.1", server.port))
  raw.sendall(
    f"GET /watch HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: "
    "Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
  )
  mask, data = b"abcd", text.encode()
  raw.sendall(
    bytes([0x81, 0x80 | len(data)])
    + mask
    + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
  )
  with raw:
    yield
