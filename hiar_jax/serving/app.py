"""The web application: three static files, a WebSocket for each tab, and downloads. No input from a
page reaches a generation unchecked.

A page sends commands as JSON texts (see `_carry_out`), one with an uploaded file in the same
message; it receives JSON texts, and the video's bytes while they are made. The file on disk is the
buffer between a generation and its client: each client reads at its own pace, so a slow one delays
nobody and takes no memory.
"""

import asyncio
import contextlib
import importlib.resources
import ipaddress
import json
import math
import os
import pathlib
import traceback
from typing import Any
import urllib.parse

from aiohttp import WSCloseCode, WSMsgType, web

from hiar_jax.errors import UserError
from hiar_jax.generation.prompts_file import MAX_SEED
from hiar_jax.serving import uploads
from hiar_jax.serving.queue import Client, ServerConfig, SessionQueue
from hiar_jax.serving.session import Request

FILES = {
  "/": ("index.html", "text/html"),
  "/page.js": ("page.js", "text/javascript"),
  "/page.css": ("page.css", "text/css"),
}
# all that a page's text can select
COMMANDS = ("start", "prompt", "pause", "go", "extend", "stop", "at")
MAX_PROMPT = 2000  # characters
MAX_REQUEST = 2**16  # bytes of one command; a longer one is refused unread
MAX_MESSAGE = 2**24  # bytes with an uploaded file; a socket that sends more is closed
NEWS_EVERY = 0.25  # seconds between two statuses without anything new

# Allows the page what it uses itself: data: is its empty icon, blob: its MediaSource.
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

QUEUE = web.AppKey("queue", SessionQueue)
HOSTS = web.AppKey("hosts", frozenset)


def make_app(config: ServerConfig, hosts: frozenset[str] = frozenset()) -> web.Application:
  """Returns the application. hosts: names, beside localhost and IP addresses, under which the page
  may be reached.
  """
  app = web.Application(middlewares=[_check_origin], client_max_size=MAX_REQUEST)
  app[HOSTS] = frozenset(host.lower() for host in hosts)
  app.cleanup_ctx.append(lambda app: _open_queue(app, config))
  for path in FILES:
    app.router.add_get(path, _static)
  app.router.add_get("/watch", _websocket)
  app.router.add_get("/clips/{name}", _download)
  # an open socket would keep its handler, and so the shutdown, until the timeout
  app.on_shutdown.append(_close_sockets)
  return app


async def _open_queue(app: web.Application, config: ServerConfig):
  """Holds the queue open, in the event loop that serves, for as long as the application runs."""
  app[QUEUE] = queue = SessionQueue(config)
  sweeping = asyncio.create_task(queue.sweep())
  yield
  sweeping.cancel()
  with contextlib.suppress(asyncio.CancelledError):
    await sweeping
  await queue.close()


async def _close_sockets(app: web.Application) -> None:
  app[QUEUE].reader.close()  # the handlers of these sockets may be waiting for it
  sockets = [client.socket for client in app[QUEUE].clients if client.socket is not None]
  farewells = (
    socket.close(code=WSCloseCode.GOING_AWAY, message=b"the server stops") for socket in sockets
  )
  await asyncio.gather(*farewells, return_exceptions=True)


async def _static(request: web.Request) -> web.Response:
  name, kind = FILES[request.path]
  content = (importlib.resources.files("hiar_jax.serving") / "static" / name).read_bytes()
  return web.Response(body=content, content_type=kind, charset="utf-8")


# -------------------------------------------------------------------------------- hosts and origins


@web.middleware
async def _check_origin(request: web.Request, handler) -> web.StreamResponse:
  """Refuses requests under an unknown host name or from another site's page, and adds the headers.

  Otherwise any page that a viewer visits could reach this server, directly (WebSockets know no
  same-origin policy) or under a name of its own that it lets point here (DNS rebinding).
  """
  host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
  try:
    if not _is_known(host, request.app[HOSTS]):
      raise web.HTTPForbidden(
        reason=f"this page is not reached by the name {host[:80]!r}; use localhost, or start the "
        "server with --hosts"
      )
    if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
      raise web.HTTPForbidden(reason="another site's page may not speak to this one")
    response = await handler(request)
  except web.HTTPException as error:
    response = web.Response(status=error.status, text=f"{error.reason}\n")
  if not response.prepared:  # the headers of a WebSocket were sent when it opened
    response.headers.update(HEADERS)
  return response


def _is_known(host: str, names: frozenset[str]) -> bool:
  """Returns True for IP addresses, localhost and the names given to the server: no other site can
  make one of these point here.
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
  """Sends a video by its name in the queue; no path is ever built from a request."""
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


async def _websocket(request: web.Request) -> web.StreamResponse:
  """Serves one tab from its opening to its end: receives commands while `_send` sends the video."""
  queue = request.app[QUEUE]
  if len(queue.clients) >= queue.config.max_clients:
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
      with contextlib.suppress(ConnectionError):  # the tab is gone; `leave` frees what it held
        async for message in socket:
          if message.type is WSMsgType.ERROR:
            break
          await _handle_message(queue, client, message)
    finally:
      sending.cancel()
      with contextlib.suppress(asyncio.CancelledError, ConnectionError):
        await sending
  finally:
    await queue.leave(client)
  return socket


async def _send(queue: SessionQueue, client: Client, request: web.Request) -> None:
  """Sends the video's bytes while they are made, each time followed by the status."""
  sent_session, pieces = None, 0  # pieces of it that were sent
  while True:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(client.news.wait(), NEWS_EVERY)
    client.news.clear()  # before looking, so that news during the sending is not lost
    session = client.session
    if session is not sent_session:
      sent_session, pieces = session, 0
    try:
      # sending blocks while the socket's buffers are full: the client's pace bounds the memory
      async with asyncio.timeout(queue.config.limits.idle_timeout):
        for start, end in session.content(pieces) if session else ():
          if not pieces:
            await client.socket.send_json(
              {"say": "begin", "mime": session.mime, "clip": f"/clips/{client.name}"}
            )
          await client.socket.send_bytes(await queue.run_in_thread(_read, session.path, start, end))
          pieces += 1
        await client.socket.send_json({"say": "status", **queue.status(client)})
    except TimeoutError:
      if session:
        session.end("the viewer was too slow to take it")
      if request.transport:
        request.transport.abort()  # a close frame would wait behind the bytes that nobody takes
      return


def _read(path: pathlib.Path, start: int, end: int) -> bytes:
  # reopened for each piece: a file that is held open would outlive its session
  with open(path, "rb") as file:
    return os.pread(file.fileno(), end - start, start)


async def _handle_message(queue: SessionQueue, client: Client, message) -> None:
  """Carries out the command of a message; an invalid one is answered and changes nothing."""
  try:
    command, file = _parse(message)
    answer = await _carry_out(queue, client, command, file)
  except UserError as error:
    answer = {"say": "refused", "why": str(error)}
  except Exception as error:
    # a bug: the video that is under way goes on, and the server's log says where it was. The text
    # of the error may name this machine's files.
    traceback.print_exc()
    answer = {"say": "refused", "why": f"this failed on the server ({type(error).__name__})"}
  if answer:
    await client.socket.send_json(answer)
  client.news.set()


def _parse(message) -> tuple[dict[str, Any], bytes | None]:
  """Returns (command, the uploaded file or None). Raises UserError for anything else.

  A command is a text message; with a file it is a binary one: the JSON, a line's end, the file.
  """
  text, file = message.data, None
  if message.type == WSMsgType.BINARY:
    text, _, file = message.data.partition(b"\n")
  if len(text) > MAX_REQUEST:
    raise UserError(f"a message of {len(text)} characters; a prompt has at most {MAX_PROMPT}")
  try:
    command = json.loads(text)
  except (ValueError, RecursionError):  # RecursionError: JSON nested thousands of levels deep
    raise UserError("expected a JSON object") from None
  if not isinstance(command, dict) or not isinstance(command.get("do"), str):
    raise UserError('expected a JSON object with "do"')
  return command, file


async def _carry_out(
  queue: SessionQueue, client: Client, command: dict[str, Any], file: bytes | None
) -> dict[str, Any] | None:
  """Runs a command of a page and returns its answer, if any:

  {"do": "start", "prompt": TEXT, "seed": 0, "seconds": 10 or null}   with a file also its "name"
  {"do": "prompt", "prompt": TEXT, "recache": false}
  {"do": "pause"}   {"do": "go"}   {"do": "extend", "seconds": 10}   {"do": "stop"}
  {"do": "at", "seconds": 3.2}   up to where the video has been watched

  Raises UserError where that cannot be done.
  """
  name, session = command["do"], client.session
  if name not in COMMANDS:
    raise UserError(f"there is no {name[:40]!r}; there is {', '.join(COMMANDS)}")
  if file is not None and name != "start":
    raise UserError('a file comes with "start" alone')
  if not session and name in ("prompt", "pause", "go", "extend"):
    raise UserError("nothing is being made for you; start a video first")
  match name:
    case "start":
      return await _start(queue, client, command, file)
    case "prompt":
      prompt, recache = _text(command, "prompt"), command.get("recache", False)
      if not isinstance(recache, bool):
        raise UserError("recache: expected true or false")
      block = await queue.run_in_thread(session.change_prompt, prompt, recache)
      return None if block is None else {"say": "prompt", "prompt": prompt, "block": block}
    case "pause" | "go":
      session.pause(name == "pause")
    case "extend":
      most = queue.config.limits.max_seconds
      session.extend(_number(command.get("seconds"), "seconds", 0.1, most))
    case "stop" if session:
      session.end("stopped")  # and not `queue.stop`: the client keeps the video
    case "stop":  # it may be waiting
      await queue.stop(client, "stopped")
    case "at" if session:
      session.watched(_number(command.get("seconds"), "seconds", 0, math.inf))


async def _start(
  queue: SessionQueue, client: Client, command: dict[str, Any], file: bytes | None
) -> dict[str, Any] | None:
  """Carries out "start"; what is under way ends once the command is checked and the file read."""
  prompt, seed, seconds = _text(command, "prompt"), command.get("seed", 0), command.get("seconds")
  if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
    raise UserError(f"seed: expected a whole number from 0 to {MAX_SEED}")
  if seconds is not None:
    seconds = _number(seconds, "seconds", 0.1, queue.config.limits.max_seconds)
  frames, answer = None, None
  if file is not None:
    name = _text(command, "name")
    async with queue.readers:
      frames, done = await queue.run_in_thread(
        uploads.read, queue.config.source, queue.reader, name, file
      )
    answer = {"say": "given", "done": done}
  await queue.enqueue(client, Request(prompt, seed, seconds, frames))
  return answer


def _text(command: dict[str, Any], name: str) -> str:
  """Returns a text of the command on one line. Raises UserError for anything else."""
  text = command.get(name)
  if not isinstance(text, str):
    raise UserError(f"{name}: expected a text")
  if len(text) > MAX_PROMPT:
    raise UserError(f"a {name} of {len(text)} characters; at most {MAX_PROMPT} are read")
  try:
    text.encode()  # JSON may hold lone surrogates, which no file or tokenizer takes
  except UnicodeEncodeError:
    raise UserError(
      f"{name}: expected characters that can be written down; this one holds half a pair"
    ) from None
  return " ".join(text.replace("\0", " ").split())


def _number(value, name: str, least: float, most: float) -> float:
  # a bool is an int in Python; NaN, which json reads, fails the comparison
  if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
    raise UserError(
      f"{name}: expected a number"
      + (f" from {least:g} to {most:g}" if most < math.inf else f", at least {least:g}")
    )
  return float(value)
