"""What a browser's tab does with the page's server, by hand."""

import asyncio
import contextlib
import json
import threading
import time

import aiohttp
import pytest


class Tab:
  """What a browser's tab does, by hand.

  heard: the last of each kind of news; video: the bytes so far.
  """

  def __init__(self, socket):
    self.socket, self.heard, self.video, self.said = socket, {}, b"", []

  async def say(self, **wish):
    await self.socket.send_str(json.dumps(wish))

  async def hand_in(self, content, name="cat.png", **wish):
    """Starts from a file's bytes."""
    await self.socket.send_bytes(
      json.dumps({"do": "start", "name": name, **wish}).encode() + b"\n" + content
    )

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
  assert not [
    name for name in names if name in ("_denoise", "_decode") or name.startswith("session")
  ]
