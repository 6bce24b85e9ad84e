"""A page of hiar_jax.serve over a generation without a network, in a thread of this process."""

import asyncio
import contextlib
import pathlib
import threading

from aiohttp import web

from hiar_jax import serve
from hiar_jax.errors import UserError
from hiar_jax.serving.app import QUEUE, make_app
from hiar_jax.serving.queue import ServerConfig
from hiar_jax.serving.session import Limits
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import ConditioningFrames
from tests.helpers.fake_generation import SIZE, FakeDecoder, FakeGeneration, latents_of


class FakeSource:
  """Generations of this source, in the order in which they were opened, and what they started from.

  seconds: what a tick takes.
  """

  fps, scale, sigmas = 8.0, 8, (1.0, 0.94, 0.83, 0.62, 0.0)

  def __init__(self, seconds=0.05, decoder=FakeDecoder):
    self.seconds, self.decoder, self.opened, self.streams, self.starts = (
      seconds,
      decoder,
      [],
      [],
      [],
    )

  def open(self, prompt, *, seed=0, frames=None, start=None, prefetch=2):
    if prompt == "refuse":
      raise UserError("there is no such thing")
    self.opened.append(
      FakeGeneration(prompt, seed, seconds=self.seconds, fail_at=0 if prompt == "break" else None)
    )
    given = None if start is None else latents_of(0, "given", frames=len(start.pixels))
    self.starts.append(start)
    self.streams.append(
      Stream(self.opened[-1], self.decoder(), fps=self.fps, given=given, prefetch=prefetch)
    )
    return self.streams[-1]

  def read_start(self, path, kind, name, reader):
    if kind == "image":
      pixels, said = reader.read_image(path, SIZE, SIZE)
    else:
      pixels, said = reader.read_video(path, SIZE, SIZE, self.fps, last=6)
    return ConditioningFrames(pathlib.Path(name), kind, pixels), said

  def warnings(self, prompt):
    return [
      f"the model does not know {word!r}; it is made without"
      for word in prompt.split()
      if word == "zebra"
    ]

  def provenance(self, prompt, seed, start=None):
    return {
      "prompt": prompt,
      "seed": str(seed),
      **({"start": f"{start.kind} {start.path.name}"} if start else {}),
    }


LIMITS = Limits()


class Page:
  """source: what it shows; url: where; queue: who is there."""

  def __init__(self, source, app, port):
    self.source, self.app, self.port = source, app, port
    self.url = f"http://127.0.0.1:{port}"

  @property
  def queue(self):
    return self.app[QUEUE]

  def making(self):
    """Generations under way."""
    return sum(thread.name == "_denoise" for thread in threading.enumerate())


@contextlib.contextmanager
def page(clips, *, source=None, limits=LIMITS, hosts=frozenset(), **config):
  source = source or FakeSource()
  app = make_app(ServerConfig(source, clips, limits=limits, **config), hosts)
  listener = serve.listen("127.0.0.1", 0)
  loop, ready = asyncio.new_event_loop(), threading.Event()
  stop = asyncio.Event()

  async def run():
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    ready.set()
    await stop.wait()
    await runner.cleanup()

  def work():
    with contextlib.closing(loop):
      loop.run_until_complete(run())

  thread = threading.Thread(target=work, name="page")
  thread.start()
  assert ready.wait(60)
  try:
    yield Page(source, app, listener.getsockname()[1])
  finally:
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    listener.close()
  assert not thread.is_alive()
