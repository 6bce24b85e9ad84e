"""The server behind the page: what it sends while a video is made, and the command."""

import asyncio
import os

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")

from hiar_jax import serve, stream
from hiar_jax.errors import UserError
from hiar_jax.serving.session import Limits
from tests.helpers.browser_tab import eventually, nothing_left, run, tab  # noqa: F401
from tests.helpers.fake_generation import expected
from tests.helpers.served_page import FakeSource, page
from tests.helpers.slow_cases import slow
from tests.helpers.video_reader import read_mp4

PROMPT = "a red circle"


# ----------------------------------------------------------------------------------------- watching


def test_a_video_is_watched_while_it_is_made(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.until(lambda tab: tab.is_in("idle"))
      await one.say(do="start", prompt=PROMPT, seed=3, seconds=3)
      await one.until(lambda tab: len(tab.video) > 1000)
      assert one.is_in("idle", "starting", "running") and one.heard["begin"]["mime"].startswith(
        'video/mp4; codecs="avc1.'
      )
      await one.until(lambda tab: tab.is_in("finished"))
      assert one.status["target"] == 3 and 24 <= one.status["frames"] < 24 + 3
      assert one.status["latency"] > 0 and [level["sigma"] for level in one.status["levels"]] == [
        1.0,
        0.94,
        0.83,
        0.62,
      ]
      await one.say(do="extend", seconds=1)
      await one.until(lambda tab: tab.status["frames"] >= 32 and tab.is_in("finished"))
      async with (
        aiohttp.ClientSession() as session,
        session.get(server.url + one.heard["begin"]["clip"]) as answer,
      ):
        assert answer.status == 200 and "attachment" in answer.headers["Content-Disposition"]
        assert sum(news["say"] == "begin" for news in one.said) == 1
        return one.video, await answer.read()

  with page(tmp_path) as server:
    seen, fetched = run(visit(server))
  assert seen == fetched
  (tmp_path / "seen.mp4").write_bytes(seen)
  frames, fps, said = read_mp4(tmp_path / "seen.mp4", scale=8)
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
      # ticks may pass between the counting and the asking, as many as the lead allows
      assert first <= made + 4 + 8
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

  with page(tmp_path, source=FakeSource(0.0), limits=Limits(buffer_seconds=1.0)) as server:
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
      async with (
        aiohttp.ClientSession() as session,
        session.get(server.url + one.heard["begin"]["clip"]) as answer,
      ):
        assert answer.status == 200  # it can still be fetched
      await one.say(do="start", prompt="a blue square")
      await one.until(lambda tab: tab.is_in("running") and tab.status["prompt"] == "a blue square")

  with page(tmp_path) as server:
    run(visit(server))
  assert [generation.prompt for generation in server.source.opened] == [PROMPT, "a blue square"]


@pytest.mark.parametrize("leaves", [True, *slow(False)])
def test_a_pause_before_the_first_block_holds_nobody(tmp_path, leaves):
  """The thread waits for a block that does not come; a closed tab ends it, and others come in, all
  the same.
  """

  async def visit(server):
    async with tab(server) as two:
      async with tab(server) as one:
        await one.say(do="start", prompt=PROMPT)
        await eventually(lambda: server.source.streams)
        await one.say(do="pause")
        await eventually(lambda: server.source.streams[0]._work.paused)
        if not leaves:
          await two.say(do="start", prompt=PROMPT)
          await two.until(lambda tab: tab.is_in("running"), seconds=30)
      await two.say(do="stop")
      await eventually(lambda: server.making() == 0, seconds=20)

  with page(
    tmp_path, source=FakeSource(0.3), max_generations=1, limits=Limits(grace=0.2)
  ) as server:
    run(visit(server))


def test_another_one_ends_the_one_before(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      for prompt in ("first", "second"):
        await one.say(do="start", prompt=prompt)
        await one.until(lambda tab: tab.is_in("running") and tab.status["prompt"] == prompt)  # noqa: B023
      assert sum(news["say"] == "begin" for news in one.said) == one.video.count(b"ftyp") == 2
      assert server.making() == 1 and len(os.listdir(tmp_path)) == len(server.queue.clips) == 1
    await eventually(lambda: not server.queue.clients)
    assert server.queue.clips == {}

  with page(tmp_path) as server:
    run(visit(server))


def test_what_fails_is_said_and_ends_nothing_else(tmp_path, capfd):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt="break")
      await one.until(lambda tab: tab.is_in("ended"))
      assert "block 0 is not finite" in one.status["why"]
      await one.say(do="start", prompt="refuse")
      await one.until(lambda tab: tab.is_in("ended") and tab.status["prompt"] == "refuse")
      assert one.status["why"] == "there is no such thing"

      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))

  with page(tmp_path) as server:
    run(visit(server))
  err = capfd.readouterr().err
  assert "FloatingPointError: block 0 is not finite" in err and "there is no such thing" not in err


def test_colours_come_through(tmp_path):
  """What is played is what was made."""

  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))
      return one.video

  with page(tmp_path) as server:
    (tmp_path / "seen.mp4").write_bytes(run(visit(server)))
  frames = read_mp4(tmp_path / "seen.mp4", scale=8)[0]
  assert np.abs(frames.astype(int) - expected([PROMPT] * 4)[: len(frames)]).mean() < 4


def test_one_without_end_stays_one_when_it_is_extended(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("running"))
      await one.say(do="extend", seconds=1)
      frames = one.status["frames"]
      await one.until(lambda tab: tab.status["frames"] > frames + 12)
      assert one.status["target"] is None and one.is_in("running")

  with page(tmp_path) as server:
    run(visit(server))


def test_a_video_is_at_most_so_long(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT)
      await one.until(lambda tab: tab.is_in("ended"))
      assert "at most 1 seconds" in one.status["why"] and one.status["frames"] in (8, 9, 10)

  with page(tmp_path, limits=Limits(max_seconds=1.0)) as server:
    run(visit(server))


def test_videos_are_kept_where_that_is_wanted(tmp_path):
  async def visit(server):
    async with tab(server) as one:
      await one.say(do="start", prompt=PROMPT, seconds=1)
      await one.until(lambda tab: tab.is_in("finished"))

  with page(tmp_path, keep=True) as server:
    run(visit(server))
  (path,) = tmp_path.glob("*.mp4")
  assert len(read_mp4(path)[0]) >= 8


# -------------------------------------------------------------------------------------- the command


def test_a_port_in_use_is_one_line():
  with serve.listen("127.0.0.1", 0) as first:
    port = first.getsockname()[1]
    with pytest.raises(
      UserError, match=f"port {port} of 127.0.0.1 is in use; give another one, as --port={port + 1}"
    ):
      serve.listen("127.0.0.1", port)
  with pytest.raises(UserError, match="cannot listen on 192.0.2.1"):
    serve.listen("192.0.2.1", 0)


def test_a_port_in_use_is_known_before_anything_is_loaded(monkeypatch):
  monkeypatch.setattr(
    stream,
    "open_source",
    lambda _: pytest.fail("the model is loaded before the port is known to be free"),
  )
  with serve.listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="is in use"):
    serve.start(
      stream.StreamOptions(workdir="nowhere"), serve.ServeOptions(port=first.getsockname()[1])
    )


def test_the_page_needs_its_extra(monkeypatch):
  monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'hiar_jax\[serve\]'"):
    serve.start(stream.StreamOptions(workdir="nowhere"), serve.ServeOptions())
