"""A model that is ready to stream: weights and compiled programs, shared by all of its streams."""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
import sys

import jax
import numpy as np

from hiar_jax import __version__
from hiar_jax.components.interfaces import BlockDecoder
from hiar_jax.errors import UserError
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.generation.sections import check_sections
from hiar_jax.generation.timeline import Timeline
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.streaming import packed_engine
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.live_video import AnyEngine, LiveVideo, open_engine
from hiar_jax.streaming.producer import Stream
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import lengths
from hiar_jax.video.isolated_reader import IsolatedReader


@dataclasses.dataclass(frozen=True)
class ConditioningFrames:
  """Conditioning frames that were read before, in place of a file (generation.conditioning)."""

  path: pathlib.Path  # name of the file that they came from
  kind: str  # "image" or "video"
  pixels: np.ndarray  # uint8 [F H W 3]

  def read(self, e: Experiment) -> tuple[np.ndarray, str]:
    """Returns (frames, no message), as Conditioning.read."""
    return self.pixels, ""


@dataclasses.dataclass(frozen=True)
class StreamingModel:
  """A model with its options of streaming; the engine is built when it is first used."""

  model: VideoModel
  options: TickOptions = TickOptions()
  decode_on: jax.Device | None = None  # None: the first that the layout leaves free, else the first

  @property
  def experiment(self) -> Experiment:
    return self.model.experiment

  @property
  def fps(self) -> float:
    """Frames a second of the video."""
    return self.experiment.sample.fps

  @property
  def scale(self) -> int:
    """Factor by which frames are enlarged where they are written."""
    return self.experiment.sample.scale

  @property
  def sigmas(self) -> tuple[float, ...]:
    """Noise levels, 1 first and 0 last."""
    return self.engine.sigmas

  @functools.cached_property
  def engine(self) -> AnyEngine:
    """The engine, shared by all streams."""
    return open_engine(self.model, self.options)

  def check(self, given: int | None = None) -> None:
    """Raises UserError where a packed model cannot be streamed, before its weights are loaded.

    given: latent frames that a new video starts from.
    """
    e = self.experiment
    if e.framepack:
      packed_engine.check(e, self.options)
      if given is not None:
        ends = dict(given=given, behind=0, loop=False)
        check_sections(e, e.sample.order, e.history.block, **ends)

  @functools.cached_property
  def decoder(self) -> BlockDecoder:
    """The decoder, shared by all streams: its memory is theirs."""
    device = self.decode_on
    if device is None:
      # Decoding overlaps with denoising where it has a device of its own.
      used = set(self.engine.mesh.devices.flat)
      devices = jax.local_devices()
      device = next((device for device in devices if device not in used), devices[0])
    return self.model.run.autoencoder.block_decoder(device)

  def warnings(self, prompt: str) -> list[str]:
    """Returns warnings about words of a prompt that the model does not know, a line each."""
    return self.model.run.text_encoder.warnings(prompt)

  def read_start(
    self, path: pathlib.Path, kind: str, name: str, reader: IsolatedReader
  ) -> tuple[ConditioningFrames, str]:
    """Returns (conditioning frames of a file, message about their resizing or cropping, or '').

    kind: "image" or "video"; of a video the last frames are kept, as many as a window holds. name:
    the name that errors and metadata give it. Raises UserError, as Conditioning.read.
    """
    e = self.experiment
    k = e.history.block
    window = -(-self.engine.window // k) * k  # rounded up to whole blocks
    pixels, message = Conditioning(path, kind, e.codec.pixel_frames(window)).read(e, reader)
    return ConditioningFrames(pathlib.Path(name), kind, pixels), message

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
    """Opens a new stream.

    frames: pixel frames of the video, those of its start included, rounded up to whole blocks;
    None: without end. Raises UserError unless there is either a prompt or a timeline, and where the
    start cannot be used.
    """
    if (prompt is None) == (timeline is None):
      raise UserError(
        'give either a prompt, as "a red circle moving left", or a timeline, as "0s: a red '
        'circle, 10s: a blue square"'
      )
    self.check()
    given, before = None, 0
    if start is not None:
      pixels, message = start.read(self.experiment)
      if message:
        print(message, file=sys.stderr)
      before = self.experiment.codec.latent_frames(len(pixels))
    self.check(before)
    if start is not None:
      latents = np.asarray(self.model.run.autoencoder.latents(pixels[None]))
      given = latents[:, :before]  # [1 f h w c]
    changes = timeline.changes(self.seconds(before)) if timeline else []
    first = changes.pop(0).prompt if changes else prompt
    generation = LiveVideo(self.engine, first, seed, start=given)
    # once more, now that the first new block is known: changes that fall into the start merge
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
    """Resumes what Stream.save wrote, also on another layout.

    timeline: replaces the one that it was saved with. Raises UserError where it has as many frames
    already, and as LiveVideo.restore.
    """
    self.check()
    generation = LiveVideo.restore(directory, self.engine)
    given = generation.given_frames
    options = {}
    if timeline:  # without `changes`, those that were saved hold
      options["changes"] = timeline.changes(self.seconds(given), generation.next_block)
    stream = Stream.resume(
      generation,
      self.decoder,
      (1, self.engine.block, *self.engine.frame),
      fps=self.fps,
      blocks=self._blocks(frames, given),
      prefetch=prefetch,
      **options,
    )
    # only now: the frames of the chunks that were not taken are known to the stream alone
    taken = stream.taken
    if frames is not None and taken >= frames:
      stream.close()
      raise UserError(
        f"frames = {frames}, but {directory} has {taken} already; ask for more, or for "
        "frames=endless"
      )
    return stream

  def seconds(self, given: int) -> Callable[[int], float]:
    """Returns a function block -> second at which it starts, after `given` latent frames."""
    k, pixel_frames = self.experiment.history.block, self.experiment.codec.pixel_frames
    first = -(-given // k)  # the first new block

    def start(block: int) -> float:
      before = max(0, given + (block - first) * k)
      # pixel_frames(0) need not be 0: a Wan video of n latent frames has 4 n - 3
      return pixel_frames(before) / self.fps if before else 0.0

    return start

  def provenance(
    self, prompt: str, seed: int, start: Conditioning | ConditioningFrames | None = None
  ) -> dict[str, str]:
    """Returns the metadata of a video file. prompt: the one that it starts with."""
    e = self.experiment
    return {
      "prompt": prompt,
      "seed": str(seed),
      "size": f"{e.data.height}x{e.data.width}",
      "dtype": e.model.dtype,
      "codec": e.codec.label,
      "start": f"{start.kind} {pathlib.Path(start.path).name}" if start else "",
      **self.model.origin,
      "hiar_jax": __version__,
    }

  def _blocks(self, frames: int | None, given: int) -> int | None:
    """Returns the blocks that fill `frames` pixel frames after `given` latent frames."""
    if frames is None:
      return None
    e = self.experiment
    latent, message = lengths.fit_blocks(frames, e.history.block, e.codec.pixel_frames, given=given)
    if message:
      print(message, file=sys.stderr)
    return latent // e.history.block
