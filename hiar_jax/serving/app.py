"""The web side: three files, one WebSocket a tab, downloads. Nothing that comes in reaches a
generation unchecked.

The page sends JSON texts, one command each (see `Talk`), or one with a file to start from behind
it; it gets JSON texts, and the video's bytes as they are made. The file on disk is the buffer
between a
generation and its client: a client reads it at its own pace, so a slow one holds up nobody, and
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
from hiar_jax.serving.queue import Client, ServerConfig, SessionQueue
from hiar_jax.serving.session import Request

FILES = {
  "/": ("index.html", "text/html"),
  "/page.js": ("page.js", "text/javascript"),
  "/page.css": ("page.css", "text/css"),
}
MAX_PROMPT = 2000  # characters
MAX_REQUEST = 2**16  # bytes of one command; what is longer is refused unread
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

QUEUE, HOSTS = web.AppKey("queue", SessionQueue), web.AppKey("hosts", frozenset)


def make_app(config: ServerConfig, hosts: frozenset[str] = frozenset()) -> web.Application:
  """hosts: names, beside localhost and any address in numbers, under which the page may be
  reached.
  """
  app = web.Application(middlewares=[_guard], client_max_size=MAX_REQUEST)
  app[HOSTS] = frozenset(host.lower() for host in hosts)
  app.cleanup_ctx.append(lambda app: _open_queue(app, config))
  static = importlib.resources.files("hiar_jax.serving") / "static"
  for path, (name, kind) in FILES.items():
    app.router.add_get(path, _fixed((static / name).read_bytes(), kind))
  app.router.add_get("/watch", _watch)
  app.router.add_get("/clips/{name}", _download)
  app.on_shutdown.append(_close_sockets)
  return app


async def _open_queue(app: web.Application, config: ServerConfig):
  app[QUEUE] = queue = SessionQueue(config)
  sweeping = asyncio.create_task(queue.sweep())
  yield
  sweeping.cancel()
  with contextlib.suppress(asyncio.CancelledError):
    await sweeping
  await queue.close()


async def _close_sockets(app: web.Application) -> None:
  sockets = [client.socket for client in app[QUEUE].clients if client.socket is not None]
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
  path = request.app[QUEUE].clips.get(request.match_info["name"])
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
  queue = request.app[QUEUE]
  if queue.is_full:
    raise web.HTTPServiceUnavailable(
      reason=f"{queue.config.max_clients} viewers are here already; close a tab, or come back later"
    )
  client = queue.enter()
  try:
    heartbeat = queue.config.limits.heartbeat
    client.socket = socket = web.WebSocketResponse(
      heartbeat=heartbeat, max_msg_size=MAX_MESSAGE, timeout=2, compress=False
    )
    await socket.prepare(request)
    sending = asyncio.create_task(_send(queue, client, request))
    try:
      with contextlib.suppress(ConnectionError):  # it is gone; what it left is tidied up below
        async for message in socket:
          if message.type is WSMsgType.ERROR:
            break
          await _hear(queue, client, message)
    finally:
      sending.cancel()
      with contextlib.suppress(asyncio.CancelledError, ConnectionError):
        await sending
  finally:
    await queue.leave(client)
  return socket


async def _send(queue: SessionQueue, client: Client, request: web.Request) -> None:
  """The video's bytes as they are made, and how things stand."""
  sent_of, pieces = None, 0
  while True:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(client.news.wait(), NEWS_EVERY)
    client.news.clear()
    session = client.session
    if session is not sent_of:
      sent_of, pieces = session, 0
    try:
      async with asyncio.timeout(queue.config.limits.idle_timeout):
        for start, end in session.content(pieces) if session else ():
          if not pieces:
            await client.socket.send_json(
              {"say": "begin", "mime": session.mime, "clip": f"/clips/{client.name}"}
            )
          await client.socket.send_bytes(await queue.run(_read, session.path, start, end))
          pieces += 1
        await client.socket.send_json({"say": "status", **_status(queue, client)})
    except TimeoutError:
      if session:
        session.end("the viewer was too slow to take it")
      if request.transport:
        request.transport.abort()  # a farewell would only wait behind what is not being taken
      return


def _read(path: pathlib.Path, start: int, end: int) -> bytes:
  with open(path, "rb") as file:
    return os.pread(file.fileno(), end - start, start)


def _status(queue: SessionQueue, client: Client) -> dict[str, Any]:
  before = queue.before(client)
  if before is not None:
    return {"state": "waiting", "before": before, "max_generations": queue.config.max_generations}
  return client.session.status() if client.session else {"state": "idle"}


async def _hear(queue: SessionQueue, client: Client, message) -> None:
  """One message; one that cannot be carried out is answered and changes nothing."""
  try:
    command, file = _parse(message)
    answer = await Requests(queue, client, file).carry_out(command)
  except UserError as error:
    answer = {"say": "refused", "why": str(error)}
  if answer:
    await client.socket.send_json(answer)
  client.news.set()


def _parse(message) -> tuple[dict[str, Any], bytes | None]:
  """(a command, the file that came behind it)."""
  text, file = message.data, None
  if message.type == WSMsgType.BINARY:
    text, _, file = message.data.partition(b"\n")
  if len(text) > MAX_REQUEST:
    raise UserError(f"a message of {len(text)} characters; a prompt has at most {MAX_PROMPT}")
  try:
    command = json.loads(text)
  except (ValueError, RecursionError):
    raise UserError("expected a JSON object") from None
  if not isinstance(command, dict) or not isinstance(command.get("do"), str):
    raise UserError('expected a JSON object with "do"')
  return command, file


class Requests:
  """What a page may ask for:

  {"do": "start", "prompt": TEXT, "seed": 0, "seconds": 10 or null}       and behind a line's end a
  picture or video, with its "name" {"do": "prompt", "prompt": TEXT, "recache": false} {"do":
  "pause"}   {"do": "go"}   {"do": "extend", "seconds": 10}   {"do": "stop"} {"do": "at", "seconds":
  3.2}     how much of the video has been seen
  """

  def __init__(self, queue: SessionQueue, client: Client, file: bytes | None = None):
    self.queue, self.client, self.file = queue, client, file

  async def carry_out(self, command: dict[str, Any]) -> dict[str, Any] | None:
    """An answer, where there is one. Raises UserError for what cannot be done."""
    names = ("start", "prompt", "pause", "go", "extend", "stop", "at")
    does = {name: getattr(self, name) for name in names}
    if command["do"] not in does:
      raise UserError(f"there is no {command['do'][:40]!r}; there is {', '.join(does)}")
    if self.file is not None and command["do"] != "start":
      raise UserError('a file comes with "start" alone')
    return await does[command["do"]](command)

  async def start(self, command) -> dict[str, Any] | None:
    seconds = command.get("seconds")
    wanted = Request(
      _text(command, "prompt"),
      _seed(command.get("seed", 0)),
      None if seconds is None else self._seconds(seconds),
    )
    done = None
    if self.file is not None:
      frames, done = await self.queue.read(_text(command, "name"), self.file)
      wanted = dataclasses.replace(wanted, start=frames)
    await self.queue.ask(self.client, wanted)
    return None if done is None else {"say": "given", "done": done}

  async def prompt(self, command) -> dict[str, Any] | None:
    prompt, recache = _text(command, "prompt"), command.get("recache", False)
    if not isinstance(recache, bool):
      raise UserError("recache: expected true or false")
    block = await self.queue.run(self._session().change_prompt, prompt, recache)
    return None if block is None else {"say": "prompt", "prompt": prompt, "block": block}

  async def pause(self, command) -> None:
    self._session().pause(True)

  async def go(self, command) -> None:
    self._session().pause(False)

  async def extend(self, command) -> None:
    self._session().extend(self._seconds(command.get("seconds")))

  async def stop(self, command) -> None:
    if self.client.session:
      self.client.session.end("stopped")
    else:
      await self.queue.stop(self.client, "stopped")

  async def at(self, command) -> None:
    if self.client.session:
      self.client.session.watched(_number(command.get("seconds"), "seconds", 0, math.inf))

  def _session(self):
    if not self.client.session:
      raise UserError("nothing is being made for you; start a video first")
    return self.client.session

  def _seconds(self, value) -> float:
    return _number(value, "seconds", 0.1, self.queue.config.limits.max_seconds)


def _text(command: dict[str, Any], name: str) -> str:
  """On one line."""
  text = command.get(name)
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
