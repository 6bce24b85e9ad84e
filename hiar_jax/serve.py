"""A web page on which video is watched while it is made.

    python -m hiar_jax.serve --workdir=runs/shapes

prints the address to open; there, type a prompt, watch, change the prompt, pause, extend, download.
Each tab has a generation of its own, `--max_generations` of them at once; further viewers wait. The
page is reachable from this machine alone, unless `--host` says otherwise.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import ipaddress
import os
import pathlib
import socket
import sys
import tempfile

from absl import flags

from hiar_jax import stream as streams
from hiar_jax.config import command_line as configs
from hiar_jax.errors import UserError
from hiar_jax.streaming.streaming_model import StreamingModel

# Earlier names of flags, which still work; see config.command_line.
RENAMED = {
  "places": "max_generations",
  "viewers": "max_clients",
  "lead": "buffer_seconds",
  "patience": "idle_timeout",
  "hold": "grace",
  "longest": "max_seconds",
}


@dataclasses.dataclass(frozen=True)
class ServeOptions:
  """Options of the server, named as the flags; `--help` describes them."""

  host: str = "127.0.0.1"
  port: int = 8420
  hosts: tuple[str, ...] = ()
  max_generations: int = 2
  max_clients: int = 16
  buffer_seconds: float = 2.0
  idle_timeout: float = 30.0
  grace: float = 60.0
  max_seconds: float = 3600.0
  out: str | None = None


def listen(host: str, port: int) -> socket.socket:
  """Returns a listening socket. Raises UserError where the port is in use, or the address is none
  of this machine's.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
      # a server that is restarted can have its port at once, in spite of old connections
      listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      listener.bind((host, port))
      listener.listen(128)  # connections that may wait to be accepted, as aiohttp's default
    except OSError:
      listener.close()
      raise
    return listener
  except socket.gaierror as error:
    raise UserError(
      f"--host={host} is no address ({error.strerror}); give one of this machine's, as 127.0.0.1"
    ) from error
  except OverflowError:
    raise UserError(f"--port={port}: expected a number from 0 to 65535") from None
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      raise UserError(
        f"port {port} of {host} is in use; give another one, as --port={port + 1}, or 0 for any "
        "that is free"
      ) from error
    raise UserError(
      f"cannot listen on {host}, port {port} ({error.strerror}); give an address of this machine, "
      "and a port above 1023"
    ) from error


def serve(source: StreamingModel, listener: socket.socket, options: ServeOptions) -> None:
  """Serves the page until SIGINT or SIGTERM."""
  # here: aiohttp is an extra, and `start` has reported where it is missing
  from aiohttp import web

  from hiar_jax.serving.app import make_app
  from hiar_jax.serving.queue import ServerConfig
  from hiar_jax.serving.session import Limits

  limits = Limits(options.buffer_seconds, options.idle_timeout, options.grace, options.max_seconds)
  # the directory of the videos: a temporary one is removed at the end
  with (
    tempfile.TemporaryDirectory(prefix="hiar_jax_")
    if options.out is None
    else contextlib.nullcontext(options.out)
  ) as clips:
    try:
      os.makedirs(clips, exist_ok=True)
    except OSError as error:
      raise UserError(
        f"--out={clips}: cannot be made ({error.strerror}); choose another directory"
      ) from error
    config = ServerConfig(
      source,
      pathlib.Path(clips),
      max_generations=options.max_generations,
      max_clients=options.max_clients,
      keep=options.out is not None,
      limits=limits,
    )
    host, port = listener.getsockname()[:2]
    # the listener's own port, for --port=0 lets the system choose; an IPv6 address has colons
    print(f"watch at http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
    if not ipaddress.ip_address(host).is_loopback:
      print(f"anyone who reaches {host} can use this page: it has no login", file=sys.stderr)
    web.run_app(
      make_app(config, frozenset(options.hosts)),
      sock=listener,
      print=None,
      access_log=None,
      shutdown_timeout=3,
    )


def start(model: streams.StreamOptions, options: ServeOptions) -> None:
  """Loads the model and serves it.

  Raises UserError as `listen`, and where the packages of the extra [serve] are missing.
  """
  if importlib.util.find_spec("aiohttp") is None:
    raise UserError("the page needs aiohttp; install it, as pip install 'hiar_jax[serve]'")
  # before the model is loaded, which may take minutes: a port in use is known at once
  with listen(options.host, options.port) as listener:
    source = streams.open_source(model)
    # Everything is compiled now, so that no viewer waits for it, before or during a video.
    source.engine.warm("")
    with source.open("", prefetch=1) as stream:  # one block through the threads: the decoder
      next(stream)
    serve(source, listener, options)


def main() -> None:
  names = {field.name for field in dataclasses.fields(streams.StreamOptions)} & set(flags.FLAGS)
  model = streams.StreamOptions(**{name: getattr(flags.FLAGS, name) for name in names})
  options = ServeOptions(
    **{
      field.name: getattr(flags.FLAGS, field.name)
      for field in dataclasses.fields(ServeOptions)
      if field.name != "hosts"
    },
    hosts=tuple(flags.FLAGS.hosts),
  )
  start(model, options)


def define_flags() -> None:
  """Defines the command's flags."""
  streams.define_stream_flags()
  flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "address to listen on; 0.0.0.0: all of this machine's, so that others can reach the page",
  )
  flags.DEFINE_integer("port", 8420, "port to listen on; 0: any that is free", 0, 65535)
  flags.DEFINE_list(
    "hosts",
    [],
    "names under which the page may be reached, beside localhost and addresses in numbers",
  )
  flags.DEFINE_integer(
    "max_generations", 2, "most generations at once; further viewers wait in a queue", 1
  )
  flags.DEFINE_integer("max_clients", 16, "most open tabs, waiting ones included", 1)
  flags.DEFINE_float("buffer_seconds", 2.0, "seconds of video made ahead of the viewer", 0.1)
  flags.DEFINE_float(
    "idle_timeout",
    30.0,
    "seconds that a viewer may stand still, with video to watch, before it loses its place",
    1,
  )
  flags.DEFINE_float(
    "grace",
    60.0,
    "seconds that a paused or finished generation keeps its place while others wait",
    0,
  )
  flags.DEFINE_float("max_seconds", 3600.0, "longest video in seconds", 1)
  configs.define_path(
    "out",
    None,
    "directory in which the videos stay; default: a temporary one, each gone with its tab",
  )


if __name__ == "__main__":
  define_flags()
  configs.run_flags(main, renamed={**streams.RENAMED, **RENAMED})
