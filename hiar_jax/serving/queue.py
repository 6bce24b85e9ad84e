"""The queue of sessions: one a client, a limited number at once; further clients wait in the order
of their requests.
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

from hiar_jax.serving.session import Limits, Request, Session
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.video.isolated_reader import IsolatedReader

CLOSED = "the tab was closed"
READERS = 2  # uploads that are decoded at once: each may hold a long video's frames in memory


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  """The server's configuration."""

  source: StreamingModel
  clips: pathlib.Path  # directory of the videos
  max_generations: int = 2  # at once
  max_clients: int = 16  # open tabs at once
  keep: bool = False  # videos stay when their tab is closed
  limits: Limits = Limits()


class Client:
  """An open tab, with its request and its session while it has one."""

  def __init__(self):
    self.request: Request | None = None
    self.session: Session | None = None
    self.name = ""  # of its video's file
    self.news = asyncio.Event()  # set when its status may have changed
    self.socket: Any = None  # its aiohttp.web.WebSocketResponse


class SessionQueue:
  """The clients, their sessions and those who wait.

  All state belongs to the event loop and needs no lock; `run_in_thread` is for what takes long.
  """

  def __init__(self, config: ServerConfig):
    self.config = config
    self.clients: set[Client] = set()
    self.clips: dict[str, pathlib.Path] = {}  # the files that may be downloaded, by name
    self._waiting: collections.deque[Client] = collections.deque()
    self._active: set[Client] = set()  # clients that hold one of the max_generations places
    self.readers = asyncio.Semaphore(READERS)  # held while an upload is read
    self.reader = IsolatedReader()  # closed by the application, before it waits for the clients
    # for each client a tick and an upload to wait for, and two to spare
    self._pool = ThreadPoolExecutor(2 * config.max_clients + 2, thread_name_prefix="queue")

  def enter(self) -> Client:
    """Adds a client."""
    client = Client()
    self.clients.add(client)
    return client

  async def leave(self, client: Client) -> None:
    """Removes a client whose tab is gone, with its session and (unless kept) its video."""
    await self.stop(client, CLOSED)
    self.clients.discard(client)

  async def enqueue(self, client: Client, request: Request) -> None:
    """Starts a request, or appends it to the waiting ones; ends what the client had before."""
    await self.stop(client, "another one was started")
    client.request = request
    self._waiting.append(client)
    self._admit()

  async def stop(self, client: Client, why: str) -> None:
    """Ends a client's session, or its waiting, and gives its place to the next one."""
    if client in self._waiting:
      self._waiting.remove(client)
    client.request = None
    if client.session:
      session = client.session
      await self.run_in_thread(session.close, why)
      if client.session is session:  # else another command replaced it meanwhile
        self._discard_video(client)
    self._active.discard(client)
    self._admit()

  async def sweep(self) -> None:
    """Frees the places of ended and of idle sessions for those who wait, once a second."""
    while True:
      await asyncio.sleep(1)
      for client in list(self._active):
        session = client.session
        if self._waiting and session and session.idle_seconds() > self.config.limits.grace:
          session.end(
            f"others were waiting, and this one had stood still for {self.config.limits.grace:g} "
            "seconds"
          )
        # an ended session stays with its client, for its video can still be watched
        if session is None or session.is_over:
          self._active.discard(client)
      self._admit()

  async def run_in_thread(self, function: Callable, *arguments):
    """Returns function(*arguments), run in a thread: it may wait for a tick or the disk."""
    return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

  def status(self, client: Client) -> dict[str, Any]:
    """Returns a client's status as the page shows it: waiting, its session's, or idle."""
    if client not in self._waiting:
      return client.session.status() if client.session else {"state": "idle"}
    return {
      "state": "waiting",
      "before": self._waiting.index(client),
      "max_generations": self.config.max_generations,
    }

  async def close(self) -> None:
    """Removes all clients."""
    for client in list(self.clients):
      await self.leave(client)
    self._pool.shutdown(wait=False)

  def _admit(self) -> None:
    """Starts waiting requests while there are places."""
    while self._waiting and len(self._active) < self.config.max_generations:
      client = self._waiting.popleft()
      self._active.add(client)
      self._begin(client)
    for client in self._waiting:  # their numbers in the queue have changed
      client.news.set()

  def _begin(self, client: Client) -> None:
    """Starts the session of a client's request."""
    self._discard_video(client)
    loop, news = asyncio.get_running_loop(), client.news

    def changed() -> None:
      # from the session's thread, which may outlive the event loop by a moment
      if not loop.is_closed():
        loop.call_soon_threadsafe(news.set)

    # the token makes it unguessable: clips are downloaded by name alone (72 random bits)
    client.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_urlsafe(9)}.mp4"
    path = self.config.clips / client.name
    self.clips[client.name] = path
    client.session = Session(self.config.source, client.request, path, self.config.limits, changed)
    news.set()

  def _discard_video(self, client: Client) -> None:
    """Drops an ended session, and its video unless videos are kept."""
    path = self.clips.pop(client.name, None)
    if path and not self.config.keep:
      path.unlink(missing_ok=True)
    client.session, client.name = None, ""
