"""The web side: three files, one WebSocket a tab, downloads. Nothing that comes in reaches a
generation unchecked.

The page sends JSON texts, one wish each (see `Talk`), or one with a file to start from behind it;
it gets JSON texts, and the video's bytes as they are made. The file on disk is the buffer between a
generation and its viewer: a viewer reads it at its own pace, so a slow one holds up nobody, and
costs no memory.
"""

import asyncio
import contextlib
import dataclasses
import importlib.resources
import ipaddress
import json
import math
import os
import pathlib
from typing import Any
import urllib.parse

from aiohttp import WSCloseCode, WSMsgType, web

from hiar_jax.errors import UserError
from hiar_jax.generation.prompts_file import MAX_SEED
from hiar_jax.serving.queue import Desk, House, Viewer
from hiar_jax.serving.session import Wish

FILES = {
  "/": ("index.html", "text/html"),
  "/page.js": ("page.js", "text/javascript"),
  "/page.css": ("page.css", "text/css"),
}
MAX_PROMPT = 2000  # characters
MAX_WISH = 2**16  # bytes of one wish; what is longer is refused unread
MAX_MESSAGE = 2**24  # bytes, those of a file included; a socket that sends more is closed
NEWS_EVERY = 0.25  # seconds between two reports without anything new

_POLICY = (
  "default-src 'self'",
  "img-src 'self' data:",
  "media-src 'self' blob:",
  "frame-ancestors 'none'",
  "base-uri 'none'",
  "form-action 'none'",
)
HEADERS = {
  "Content-Security-Policy": "; ".join(_POLICY),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cache-Control": "no-store",
}

DESK, HOSTS = web.AppKey("desk", Desk), web.AppKey("hosts", frozenset)


def make_app(house: House, hosts: frozenset[str] = frozenset()) -> web.Application:
  """hosts: names, beside localhost and any address in numbers, under which the page may be
  reached.
  """
  app = web.Application(middlewares=[_guard], client_max_size=MAX_WISH)
  app[HOSTS] = frozenset(host.lower() for host in hosts)
  app.cleanup_ctx.append(lambda app: _open_desk(app, house))
  static = importlib.resources.files("hiar_jax.page") / "static"
  for path, (name, kind) in FILES.items():
    app.router.add_get(path, _fixed((static / name).read_bytes(), kind))
  app.router.add_get("/watch", _watch)
  app.router.add_get("/clips/{name}", _download)
  app.on_shutdown.append(_close_sockets)
  return app


async def _open_desk(app: web.Application, house: House):
  app[DESK] = desk = Desk(house)
  sweeping = asyncio.create_task(desk.sweep())
  yield
  sweeping.cancel()
  with contextlib.suppress(asyncio.CancelledError):
    await sweeping
  await desk.close()


async def _close_sockets(app: web.Application) -> None:
  sockets = [viewer.socket for viewer in app[DESK].viewers if viewer.socket is not None]
  farewells = (
    socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops") for socket in sockets
  )
  await asyncio.gather(*farewells, return_exceptions=True)


def _fixed(content: bytes, kind: str):
  async def handle(_: web.Request) -> web.Response:
    return web.Response(body=content, content_type=kind, charset="utf-8")

  return handle


# --------------------------------------------------------------------------------------- the guards


@web.middleware
async def _guard(request: web.Request, handler) -> web.StreamResponse:
  """Only for those who came by the page's own address: else another site's page could speak to it,
  by a name of its own (DNS rebinding).
  """
  host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
  if not _is_known(host, request.app[HOSTS]):
    return _refusal(
      403,
      f"this page is not reached by the name {host[:80]!r}; use localhost, or start the server "
      "with --hosts",
    )
  if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
    return _refusal(403, "another site's page may not speak to this one")
  try:
    response = await handler(request)
  except web.HTTPException as error:
    response = _refusal(error.status, error.reason)
  if not response.prepared:
    response.headers.update(HEADERS)
  return response


def _refusal(status: int, why: str) -> web.Response:
  return web.Response(status=status, text=f"{why}\n", headers=HEADERS)


def _is_known(host: str, names: frozenset[str]) -> bool:
  """A name cannot be made to point elsewhere where it is a number, or localhost, or one that the
  person at the server has named.
  """
  try:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
  except ValueError:
    return False
  if name == "localhost" or name in names:
    return True
  with contextlib.suppress(ValueError):
    return bool(ipaddress.ip_address(name))
  return False


# ---------------------------------------------------------------------------------------- downloads


async def _download(request: web.Request) -> web.StreamResponse:
  """A clip of this server, by the name that it was given; nothing else has a name here."""
  path = request.app[DESK].clips.get(request.match_info["name"])
  if path is None or not path.exists():
    raise web.HTTPNotFound(reason="there is no such video; it is kept while its tab is open")
  headers = {
    **HEADERS,
    "Content-Disposition": f'attachment; filename="{path.name}"',
    "Content-Type": "video/mp4",
  }
  return web.FileResponse(path, headers=headers)


# --------------------------------------------------------------------------------------- the socket


async def _watch(request: web.Request) -> web.StreamResponse:
  desk = request.app[DESK]
  if desk.is_full:
    raise web.HTTPServiceUnavailable(
      reason=f"{desk.house.viewers} viewers are here already; close a tab, or come back later"
    )
  viewer = desk.enter()
  try:
    heartbeat = desk.house.rules.heartbeat
    viewer.socket = socket = web.WebSocketResponse(
      heartbeat=heartbeat, max_msg_size=MAX_MESSAGE, timeout=2, compress=False
    )
    await socket.prepare(request)
    sending = asyncio.create_task(_send(desk, viewer, request))
    try:
      with contextlib.suppress(ConnectionError):  # it is gone; what it left is tidied up below
        async for message in socket:
          if message.type is WSMsgType.ERROR:
            break
          await _hear(desk, viewer, message)
    finally:
      sending.cancel()
      with contextlib.suppress(asyncio.CancelledError, ConnectionError):
        await sending
  finally:
    await desk.leave(viewer)
  return socket


async def _send(desk: Desk, viewer: Viewer, request: web.Request) -> None:
  """The video's bytes as they are made, and how things stand."""
  sent_of, pieces = None, 0
  while True:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(viewer.news.wait(), NEWS_EVERY)
    viewer.news.clear()
    showing = viewer.showing
    if showing is not sent_of:
      sent_of, pieces = showing, 0
    try:
      async with asyncio.timeout(desk.house.rules.patience):
        for start, end in showing.content(pieces) if showing else ():
          if not pieces:
            await viewer.socket.send_json(
              {"say": "begin", "mime": showing.mime, "clip": f"/clips/{viewer.name}"}
            )
          await viewer.socket.send_bytes(await desk.run(_read, showing.path, start, end))
          pieces += 1
        await viewer.socket.send_json({"say": "status", **_status(desk, viewer)})
    except TimeoutError:
      if showing:
        showing.end("the viewer was too slow to take it")
      if request.transport:
        request.transport.abort()  # a farewell would only wait behind what is not being taken
      return


def _read(path: pathlib.Path, start: int, end: int) -> bytes:
  with open(path, "rb") as file:
    return os.pread(file.fileno(), end - start, start)


def _status(desk: Desk, viewer: Viewer) -> dict[str, Any]:
  before = desk.before(viewer)
  if before is not None:
    return {"state": "waiting", "before": before, "places": desk.house.places}
  return viewer.showing.status() if viewer.showing else {"state": "idle"}


async def _hear(desk: Desk, viewer: Viewer, message) -> None:
  """One message; one that cannot be carried out is answered and changes nothing."""
  try:
    wish, file = _parse(message)
    answer = await Talk(desk, viewer, file).carry_out(wish)
  except UserError as error:
    answer = {"say": "refused", "why": str(error)}
  if answer:
    await viewer.socket.send_json(answer)
  viewer.news.set()


def _parse(message) -> tuple[dict[str, Any], bytes | None]:
  """(a wish, the file that came behind it)."""
  text, file = message.data, None
  if message.type == WSMsgType.BINARY:
    text, _, file = message.data.partition(b"\n")
  if len(text) > MAX_WISH:
    raise UserError(f"a message of {len(text)} characters; a prompt has at most {MAX_PROMPT}")
  try:
    wish = json.loads(text)
  except (ValueError, RecursionError):
    raise UserError("expected a JSON object") from None
  if not isinstance(wish, dict) or not isinstance(wish.get("do"), str):
    raise UserError('expected a JSON object with "do"')
  return wish, file


class Talk:
  """What a page may ask for:

  {"do": "start", "prompt": TEXT, "seed": 0, "seconds": 10 or null}       and behind a line's end a
  picture or video, with its "name" {"do": "prompt", "prompt": TEXT, "recache": false} {"do":
  "pause"}   {"do": "go"}   {"do": "extend", "seconds": 10}   {"do": "stop"} {"do": "at", "seconds":
  3.2}     how much of the video has been seen
  """

  def __init__(self, desk: Desk, viewer: Viewer, file: bytes | None = None):
    self.desk, self.viewer, self.file = desk, viewer, file

  async def carry_out(self, wish: dict[str, Any]) -> dict[str, Any] | None:
    """An answer, where there is one. Raises UserError for what cannot be done."""
    names = ("start", "prompt", "pause", "go", "extend", "stop", "at")
    does = {name: getattr(self, name) for name in names}
    if wish["do"] not in does:
      raise UserError(f"there is no {wish['do'][:40]!r}; there is {', '.join(does)}")
    if self.file is not None and wish["do"] != "start":
      raise UserError('a file comes with "start" alone')
    return await does[wish["do"]](wish)

  async def start(self, wish) -> dict[str, Any] | None:
    seconds = wish.get("seconds")
    wanted = Wish(
      _text(wish, "prompt"),
      _seed(wish.get("seed", 0)),
      None if seconds is None else self._seconds(seconds),
    )
    done = None
    if self.file is not None:
      frames, done = await self.desk.read(_text(wish, "name"), self.file)
      wanted = dataclasses.replace(wanted, start=frames)
    await self.desk.ask(self.viewer, wanted)
    return None if done is None else {"say": "given", "done": done}

  async def prompt(self, wish) -> dict[str, Any] | None:
    prompt, recache = _text(wish, "prompt"), wish.get("recache", False)
    if not isinstance(recache, bool):
      raise UserError("recache: expected true or false")
    block = await self.desk.run(self._showing().change_prompt, prompt, recache)
    return None if block is None else {"say": "prompt", "prompt": prompt, "block": block}

  async def pause(self, wish) -> None:
    self._showing().pause(True)

  async def go(self, wish) -> None:
    self._showing().pause(False)

  async def extend(self, wish) -> None:
    self._showing().extend(self._seconds(wish.get("seconds")))

  async def stop(self, wish) -> None:
    if self.viewer.showing:
      self.viewer.showing.end("stopped")
    else:
      await self.desk.stop(self.viewer, "stopped")

  async def at(self, wish) -> None:
    if self.viewer.showing:
      self.viewer.showing.watched(_number(wish.get("seconds"), "seconds", 0, math.inf))

  def _showing(self):
    if not self.viewer.showing:
      raise UserError("nothing is being made for you; start a video first")
    return self.viewer.showing

  def _seconds(self, value) -> float:
    return _number(value, "seconds", 0.1, self.desk.house.rules.longest)


def _text(wish: dict[str, Any], name: str) -> str:
  """On one line."""
  text = wish.get(name)
  if not isinstance(text, str):
    raise UserError(f"{name}: expected a text")
  if len(text) > MAX_PROMPT:
    raise UserError(f"a {name} of {len(text)} characters; at most {MAX_PROMPT} are read")
  try:
    text.encode()
  except UnicodeEncodeError:
    raise UserError(
      f"{name}: expected characters that can be written down; this one holds half a pair"
    ) from None
  return " ".join(text.replace("\0", " ").split())


def _seed(value) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
    raise UserError(f"seed: expected a whole number from 0 to {MAX_SEED}")
  return value


def _number(value, name: str, least: float, most: float) -> float:
  if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
    raise UserError(
      f"{name}: expected a number"
      + (f" from {least:g} to {most:g}" if most < math.inf else f", at least {least:g}")
    )
  return float(value)
