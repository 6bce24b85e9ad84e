"""Who is shown what, and who waits: a generation a viewer, so many at once; the others wait in the
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
from hiar_jax.serving.session import Rules, Showing, Source, Wish
from hiar_jax.streaming.source import Frames

CLOSED = "the tab was closed"
READERS = 2  # of what is handed in, at once


@dataclasses.dataclass(frozen=True)
class House:
  """places: generations at once. viewers: open tabs at once.

  clips: the directory of the videos; keep: whether they stay there.
  """

  source: Source
  clips: pathlib.Path
  places: int = 2
  viewers: int = 16
  keep: bool = False
  rules: Rules = Rules()


class Viewer:
  """A tab: what it asked for, and its showing while it has one.

  news: set when there is something to tell it.
  """

  def __init__(self):
    self.wish: Wish | None = None
    self.showing: Showing | None = None
    self.name = ""  # of its video's file
    self.news = asyncio.Event()
    self.socket: Any = None  # by which it is reached


class Desk:
  """Everything here happens in the event loop; what takes time happens in threads of its own."""

  def __init__(self, house: House):
    self.house = house
    self.viewers: set[Viewer] = set()
    self.clips: dict[str, pathlib.Path] = {}  # what may be fetched
    self._waiting: collections.deque[Viewer] = collections.deque()
    self._shown: set[Viewer] = set()
    self._readers = asyncio.Semaphore(READERS)
    self._pool = ThreadPoolExecutor(2 * house.viewers + 2, thread_name_prefix="desk")

  @property
  def is_full(self) -> bool:
    return len(self.viewers) >= self.house.viewers

  def enter(self) -> Viewer:
    viewer = Viewer()
    self.viewers.add(viewer)
    return viewer

  async def leave(self, viewer: Viewer) -> None:
    """The tab is gone: nothing of it stays, but a video that is to be kept."""
    await self.stop(viewer, CLOSED)
    self.viewers.discard(viewer)

  async def ask(self, viewer: Viewer, wish: Wish) -> None:
    """Starts it, or puts it at the end of those who wait; what the viewer had before ends."""
    await self.stop(viewer, "another one was started")
    viewer.wish = wish
    self._waiting.append(viewer)
    self._admit()

  async def stop(self, viewer: Viewer, why: str) -> None:
    if viewer in self._waiting:
      self._waiting.remove(viewer)
    viewer.wish = None
    if viewer.showing:
      showing = viewer.showing
      await self.run(showing.close, why)
      if viewer.showing is showing:
        self._forget(viewer)
    self._shown.discard(viewer)
    self._admit()

  async def sweep(self) -> None:
    """Once a second: places that are not used any more go to those who wait."""
    while True:
      await asyncio.sleep(1)
      for viewer in list(self._shown):
        showing = viewer.showing
        if self._waiting and showing and showing.idle_seconds() > self.house.rules.hold:
          showing.end(
            f"others were waiting, and this one had stood still for {self.house.rules.hold:g} "
            "seconds"
          )
        if showing is None or showing.is_over:
          self._shown.discard(viewer)
      self._admit()

  async def run(self, function: Callable, *arguments):
    """In a thread, for what takes as long as a tick."""
    return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

  async def read(self, name: str, content: bytes) -> tuple[Frames, str]:
    """A file that was handed in, and what was done to it.

    Raises UserError where it cannot be used.
    """
    async with self._readers:
      return await self.run(uploads.read, self.house.source, name, content)

  def before(self, viewer: Viewer) -> int | None:
    """How many are waiting before a viewer; None for one that does not wait."""
    return self._waiting.index(viewer) if viewer in self._waiting else None

  async def close(self) -> None:
    for viewer in list(self.viewers):
      await self.leave(viewer)
    self._pool.shutdown(wait=False)

  def _admit(self) -> None:
    while self._waiting and len(self._shown) < self.house.places:
      viewer = self._waiting.popleft()
      self._shown.add(viewer)
      self._begin(viewer)
    for viewer in self._waiting:
      viewer.news.set()

  def _begin(self, viewer: Viewer) -> None:
    self._forget(viewer)
    loop, news = asyncio.get_running_loop(), viewer.news

    def changed() -> None:
      if not loop.is_closed():
        loop.call_soon_threadsafe(news.set)

    viewer.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_urlsafe(9)}.mp4"
    path = self.house.clips / viewer.name
    self.clips[viewer.name] = path
    viewer.showing = Showing(self.house.source, viewer.wish, path, self.house.rules, changed)
    viewer.showing.start()
    news.set()

  def _forget(self, viewer: Viewer) -> None:
    """The video of an ended showing."""
    path = self.clips.pop(viewer.name, None)
    if path and not self.house.keep:
      path.unlink(missing_ok=True)
    viewer.showing, viewer.name = None, ""
