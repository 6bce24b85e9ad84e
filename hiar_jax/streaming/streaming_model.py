"""A model that is ready to stream: weights and programs in place, shared by as many streams as are
opened from it.
"""

import dataclasses
import functools
import os
import pathlib
import sys

import jax
import numpy as np

from hiar_jax import __version__
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning import Conditioning, latent_frames
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.streaming import decoding
from hiar_jax.streaming.compiled_tick import Engine, TickOptions
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.producer import Stream, block_seconds
from hiar_jax.streaming.timeline import Timeline
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import lengths


@dataclasses.dataclass(frozen=True)
class ConditioningFrames:
  """A start that was read before: uint8 [F H W 3] of one `kind`, and the name of the file that it
  came from.
  """

  path: pathlib.Path
  kind: str
  pixels: np.ndarray

  def read(self, e: Experiment) -> tuple[np.ndarray, str]:
    return self.pixels, ""


@dataclasses.dataclass(frozen=True)
class StreamingModel:
  """decode_on: the device of the decoder; None: the last one that the layout leaves free, else the
  first.
  """

  model: VideoModel
  options: TickOptions = TickOptions()
  decode_on: jax.Device | None = None

  @property
  def experiment(self) -> Experiment:
    return self.model.experiment

  @property
  def fps(self) -> float:
    return self.experiment.sample.fps

  @property
  def scale(self) -> int:
    return self.experiment.sample.scale

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of the frames as they are written."""
    return self.experiment.data.height * self.scale, self.experiment.data.width * self.scale

  @property
  def sigmas(self) -> tuple[float, ...]:
    """Of the noise levels, 1 first and 0 last."""
    return self.engine.parts.sigmas

  @property
  def block_frames(self) -> int:
    """Frames of a block that is not the first."""
    k, pixels = self.experiment.history.block, self.experiment.pixel_frames
    return pixels(2 * k) - pixels(k)

  @functools.cached_property
  def engine(self) -> Engine:
    return Engine(self.model, self.options)

  @functools.cached_property
  def decoder(self) -> decoding.BlockDecoder:
    return decoding.make_decoder(
      self.model.run.components, self.decode_on or _free_device(self.engine)
    )

  def remarks(self, prompt: str) -> list[str]:
    """What the model will not understand of a prompt, a line each."""
    return self.model.run.components.remarks(prompt)

  def read_start(self, path: pathlib.Path, kind: str, name: str) -> tuple[ConditioningFrames, str]:
    """(a file's frames, of a video those that a window holds, at its end; what was done to them in
    a line, '' for nothing).

    kind: "image" or "video"; name: what it is called from then on. Raises UserError, as Start.read.
    """
    e, k = self.experiment, self.experiment.history.block
    window = -(-self.engine.plan.method.window // k) * k
    pixels, line = Conditioning(path, kind, e.pixel_frames(window)).read(e)
    return ConditioningFrames(pathlib.Path(name), kind, pixels), line

  def open(
    self,
    prompt: str | None = None,
    *,
    timeline: Timeline | None = None,
    seed: int = 0,
    frames: int | None = None,
    start: Conditioning | ConditioningFrames | None = None,
    prefetch: int = 2,
  ) -> Stream:
    """A new stream. frames: of the video, those of its start included, rounded up to whole blocks;
    None: without end.

    Raises UserError where neither a prompt nor a timeline says what to show, or both do, and where
    the start cannot be used.
    """
    if (prompt is None) == (timeline is None):
      raise UserError(
        'give either a prompt, as "a red circle moving left", or a timeline, as "0s: a red '
        'circle, 10s: a blue square"'
      )
    given = self._given(start)
    before = 0 if given is None else given.shape[1]
    changes = timeline.changes(self.seconds(before)) if timeline else []
    first = changes.pop(0).prompt if changes else prompt
    generation = LiveVideo(self.engine, first, seed, start=given)
    changes = timeline.changes(self.seconds(before), generation.next_block) if timeline else []
    return Stream(
      generation,
      self.decoder,
      fps=self.fps,
      blocks=self._blocks(frames, before),
      changes=changes,
      given=given,
      prefetch=prefetch,
    )

  def resume(
    self,
    directory: str | os.PathLike,
    *,
    timeline: Timeline | None = None,
    frames: int | None = None,
    prefetch: int = 2,
  ) -> Stream:
    """Goes on with what Stream.save wrote; the layout may be another. timeline: in place of the one
    that it was saved with.

    Raises UserError where it has as many frames already, or what Generation.restore raises.
    """
    generation = LiveVideo.restore(directory, self.engine)
    k, (height, width) = self.experiment.history.block, self.engine.parts.size
    changes = (
      {"changes": timeline.changes(self.seconds(generation.given_frames), generation.next_block)}
      if timeline
      else {}
    )
    stream = Stream.resume(
      generation,
      self.decoder,
      (1, k, height, width, self.engine.parts.config.channels),
      fps=self.fps,
      blocks=self._blocks(frames, generation.given_frames),
      prefetch=prefetch,
      **changes,
    )
    taken = stream.taken
    if frames is not None and taken >= frames:
      stream.close()
      raise UserError(
        f"frames = {frames}, but {directory} has {taken} already; ask for more, or for "
        "frames=endless"
      )
    return stream

  def seconds(self, given: int):
    """block -> second at which it starts, after so many given latent frames."""
    e = self.experiment
    return block_seconds(
      -(-given // e.history.block), given, e.history.block, e.pixel_frames, self.fps
    )

  def provenance(
    self, prompt: str, seed: int, start: Conditioning | ConditioningFrames | None = None
  ) -> dict[str, str]:
    """What a file says of itself. prompt: the one that it starts with."""
    e = self.experiment
    return {
      "prompt": prompt,
      "seed": str(seed),
      "size": f"{e.data.height}x{e.data.width}",
      "dtype": e.model.dtype,
      "codec": self.model.codec,
      "start": f"{start.kind} {pathlib.Path(start.path).name}" if start else "",
      "weights" if self.model.weights else "workdir": self.model.name,
      "hiar_jax": __version__,
    }

  def _given(self, start: Conditioning | ConditioningFrames | None) -> np.ndarray | None:
    """[1 f h w c]"""
    if start is None:
      return None
    pixels, line = start.read(self.experiment)
    if line:
      print(line, file=sys.stderr)
    return np.asarray(self.model.run.components.latents(pixels[None]))[
      :, : latent_frames(pixels, self.experiment)
    ]

  def _blocks(self, frames: int | None, given: int) -> int | None:
    if frames is None:
      return None
    e = self.experiment
    latent, message = lengths.fit_blocks(frames, e.history.block, e.pixel_frames, given=given)
    if message:
      print(message, file=sys.stderr)
    return latent // e.history.block


def _free_device(engine: Engine) -> jax.Device:
  """Decoding overlaps with denoising where it has a device of its own."""
  used = set(engine.mesh.devices.flat)
  free = [device for device in jax.local_devices() if device not in used]
  return free[0] if free else jax.local_devices()[0]
