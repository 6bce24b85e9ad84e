"""Who is shown what, and who waits: a generation a client, so many at once; the others wait in the
order in which they asked.
"""

import asyncio
import collections
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import pathlib
import secrets
import time
from typing import Any

from hiar_jax.serving import uploads
from hiar_jax.serving.session import Limits, Request, Session, StreamSource
from hiar_jax.streaming.streaming_model import ConditioningFrames

CLOSED = "the tab was closed"
READERS = 2  # of what is handed in, at once


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  """max_generations: at once. max_clients: open tabs at once.

  clips: the directory of the videos; keep: whether they stay there.
  """

  source: StreamSource
  clips: pathlib.Path
  max_generations: int = 2
  max_clients: int = 16
  keep: bool = False
  limits: Limits = Limits()


class Client:
  """A tab: what it asked for, and its session while it has one.

  news: set when there is something to tell it.
  """

  def __init__(self):
    self.request: Request | None = None
    self.session: Session | None = None
    self.name = ""  # of its video's file
    self.news = asyncio.Event()
    self.socket: Any = None  # by which it is reached


class SessionQueue:
  """Everything here happens in the event loop; what takes time happens in threads of its own."""

  def __init__(self, config: ServerConfig):
    self.config = config
    self.clients: set[Client] = set()
    self.clips: dict[str, pathlib.Path] = {}  # what may be fetched
    self._waiting: collections.deque[Client] = collections.deque()
    self._shown: set[Client] = set()
    self._readers = asyncio.Semaphore(READERS)
    self._pool = ThreadPoolExecutor(2 * config.max_clients + 2, thread_name_prefix="queue")

  @property
  def is_full(self) -> bool:
    return len(self.clients) >= self.config.max_clients

  def enter(self) -> Client:
    client = Client()
    self.clients.add(client)
    return client

  async def leave(self, client: Client) -> None:
    """The tab is gone: nothing of it stays, but a video that is to be kept."""
    await self.stop(client, CLOSED)
    self.clients.discard(client)

  async def ask(self, client: Client, request: Request) -> None:
    """Starts it, or puts it at the end of those who wait; what the client had before ends."""
    await self.stop(client, "another one was started")
    client.request = request
    self._waiting.append(client)
    self._admit()

  async def stop(self, client: Client, why: str) -> None:
    if client in self._waiting:
      self._waiting.remove(client)
    client.request = None
    if client.session:
      session = client.session
      await self.run(session.close, why)
      if client.session is session:
        self._forget(client)
    self._shown.discard(client)
    self._admit()

  async def sweep(self) -> None:
    """Once a second: places that are not used any more go to those who wait."""
    while True:
      await asyncio.sleep(1)
      for client in list(self._shown):
        session = client.session
        if self._waiting and session and session.idle_seconds() > self.config.limits.grace:
          session.end(
            f"others were waiting, and this one had stood still for {self.config.limits.grace:g} "
            "seconds"
          )
        if session is None or session.is_over:
          self._shown.discard(client)
      self._admit()

  async def run(self, function: Callable, *arguments):
    """In a thread, for what takes as long as a tick."""
    return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

  async def read(self, name: str, content: bytes) -> tuple[ConditioningFrames, str]:
    """A file that was handed in, and what was done to it.

    Raises UserError where it cannot be used.
    """
    async with self._readers:
      return await self.run(uploads.read, self.config.source, name, content)

  def before(self, client: Client) -> int | None:
    """How many are waiting before a client; None for one that does not wait."""
    return self._waiting.index(client) if client in self._waiting else None

  async def close(self) -> None:
    for client in list(self.clients):
      await self.leave(client)
    self._pool.shutdown(wait=False)

  def _admit(self) -> None:
    while self._waiting and len(self._shown) < self.config.max_generations:
      client = self._waiting.popleft()
      self._shown.add(client)
      self._begin(client)
    for client in self._waiting:
      client.news.set()

  def _begin(self, client: Client) -> None:
    self._forget(client)
    loop, news = asyncio.get_running_loop(), client.news

    def changed() -> None:
      if not loop.is_closed():
        loop.call_soon_threadsafe(news.set)

    client.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_urlsafe(9)}.mp4"
    path = self.config.clips / client.name
    self.clips[client.name] = path
    client.session = Session(self.config.source, client.request, path, self.config.limits, changed)
    client.session.start()
    news.set()

  def _forget(self, client: Client) -> None:
    """The video of an ended session."""
    path = self.clips.pop(client.name, None)
    if path and not self.config.keep:
      path.unlink(missing_ok=True)
    client.session, client.name = None, ""
