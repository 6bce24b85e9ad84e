"""A model in Python: videos and streams, and the parts for a closer look (docs/tour.md).

model = hiar_jax.load("runs/shapes")
frames = model.generate("a red circle moving left", frames=72, seed=1)   # uint8 [72 H W 3]

model = hiar_jax.load(config="experiments/hiar_wan_1_3b.py", weights="weights/hiar")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os

import jax
from ml_collections import config_dict
import numpy as np

from hiar_jax import stream as streams
from hiar_jax.config.building import as_fields, nearest
from hiar_jax.config.command_line import load_config
from hiar_jax.errors import UserError, without_flags
from hiar_jax.generate import GenerateOptions
from hiar_jax.generation import clips, partial_video, prompts_file
from hiar_jax.generation.model_options import ModelOptions
from hiar_jax.generation.sections import check_told
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.method import Method, MethodConfig
from hiar_jax.streaming.compiled_tick import TickOptions
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.types import Params


@without_flags
def load(
  workdir: str | os.PathLike | None = None,
  *,
  config: str | config_dict.ConfigDict | None = None,
  weights: str | os.PathLike | None = None,
  stage: str | None = None,
  step: int | None = None,
  height: int | None = None,
  width: int | None = None,
  dtype: str | None = None,
  decoder: str | None = None,
  tile: int | None = None,
) -> "Model":
  """Opens a model: of a trained run (workdir), or of a config with converted weights.

  config: a ConfigDict, or FILE[:VARIANT] as the commands take it. stage: of the run, `distill`,
  `causal_init` or `framepack`; None: its last one. step: of the stage's checkpoint; None: the last
  one, of a finished stage. height and the others replace the config's, as
  generation.video_model.ModelChanges has them. Weights are loaded when they are first used.

  Raises UserError where there is no such model, or where an option does not suit it.
  """
  given = dict(
    workdir=workdir,
    config=load_config(config) if isinstance(config, str) else config,
    weights=weights,
    stage=stage,
    step=step,
    height=height,
    width=width,
    dtype=dtype,
    decoder=decoder,
    tile=tile,
  )
  return Model.of(ModelOptions(**as_fields(ModelOptions, given)).open_model())


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Model(VideoModel):
  """A VideoModel that keeps its weights and its compiled programs for the next call.

  load_once: returns the weights.
  """

  load_once: Callable[[], Params]
  # kept between calls: by their arguments, and by their options
  _samplers: dict[tuple, Callable] = dataclasses.field(default_factory=dict, init=False)
  _streaming: dict[TickOptions, StreamingModel] = dataclasses.field(
    default_factory=dict, init=False
  )

  @staticmethod
  def of(model: VideoModel) -> "Model":
    """Returns the model of a command, to be used more than once."""
    once = functools.cache(model.params)
    return Model(model.run, model.weights, model.stage, once, step=model.step)

  def __repr__(self) -> str:
    e = self.experiment
    source = self.weights or f"{self.run.workdir}, {self.stage}"
    return f"<hiar_jax model of {source}: {e.data.height}x{e.data.width}, {e.history}>"

  # ----------------------------------------------------------------------------------- videos

  @without_flags
  def generate(
    self,
    prompts: str | Sequence[str],
    frames: int | None = None,
    seed: int | Sequence[int] = 0,
    image: str | os.PathLike | None = None,
    video: str | os.PathLike | None = None,
    *,
    end_image: str | os.PathLike | None = None,
    end_video: str | os.PathLike | None = None,
    loop: bool = False,
    order: str | None = None,
    timeline: str | os.PathLike | None = None,
    takes: Mapping[int, int] | str | None = None,
  ) -> np.ndarray | list[np.ndarray]:
    """Generates the video uint8 [F H W 3] of a prompt, or a list of them, one per prompt.

    The frames are those that `python -m hiar_jax.generate` writes. frames: of a video, those of its
    start and end included, rounded up to whole blocks; None: the command's default. seed: one per
    prompt, or that of the first; the next ones count up. image, video: file that the videos start
    from. Of a packed model (docs/framepack.md): end_image, end_video: file that they end with.
    loop: they come back to their start. order: of sections. timeline: prompts by the second, added
    to the prompt. takes: {section: seed}, sections that are drawn anew.

    Raises UserError, as the command.
    """
    one = isinstance(prompts, str)
    told = dict(end_image=end_image, end_video=end_video, loop=loop, order=order)
    told |= dict(timeline=timeline, takes=takes)
    planned = self._plan([prompts] if one else prompts, frames, seed, image, video, **told)
    with jax.set_mesh(self.run.mesh):
      videos = [
        np.concatenate(list(clips.shown(self, made.clip, made.latents)))
        for made in clips.make_clips(self, planned)
      ]
    return videos[0] if one else videos

  @without_flags
  def watch(
    self, prompt: str, frames: int | None = None, seed: int = 0, image=None, video=None, **told
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generates the video of a packed model and yields, after each step of its order, (frames uint8
    [F H W 3], which of them are made, bool [F]); those that are not are grey. The last one is the
    video that `generate` returns; arguments as there.

    Raises UserError, as `generate`, and for a causal model, before the first step.
    """
    check_told(self.experiment, ["partial"])
    planned = self._plan([prompt], frames, seed, image, video, **told)

    def steps():
      made = None
      while True:
        # for each step alone: whoever takes them is not in this mesh
        with jax.set_mesh(self.run.mesh):
          made = made or clips.make_clips(self, planned, watched=True)
          step = next(made, None)
          found = step and partial_video.frames_of(self, step)
        if not found:
          return
        yield found

    return steps()

  @without_flags
  def sample_latents(
    self,
    prompts: Sequence[str],
    frames: int | None = None,
    seeds: int | Sequence[int] = 0,
    image: str | os.PathLike | None = None,
    video: str | os.PathLike | None = None,
    **told,
  ) -> np.ndarray:
    """Generates latents float32 [n f h w c], one row per prompt; arguments as `generate`."""
    planned = self._plan(prompts, frames, seeds, image, video, **told)
    with jax.set_mesh(self.run.mesh):
      # all of one shape, so they come in their order
      return np.concatenate([made.latents for made in clips.make_clips(self, planned)])

  def _plan(self, prompts: Sequence[str], frames, *start, **told) -> list[clips.Clip]:
    """Returns the clips of prompts; start: seeds, image and video."""
    prompts = _texts(prompts)
    files = dict(zip(("image", "video"), start[1:], strict=False))
    checked = {name: value for name, value in {**files, **told}.items() if name != "takes"}
    as_fields(GenerateOptions, checked)  # raises for wrong types
    jobs = prompts_file.make_jobs(prompts, *start, **told)
    return clips.plan_clips(self, jobs, [None] * len(jobs), frames)

  @without_flags
  def stream(self, prompt: str | None = None, **options) -> Stream:
    """Opens a stream of this model: hiar_jax.stream, without the options that choose a model."""
    fields = [field.name for field in dataclasses.fields(ModelOptions)]
    wanted = streams.read_options({"prompt": prompt, **options}, without=fields)
    source = self._streaming.setdefault(wanted.engine, StreamingModel(self, wanted.engine))
    return streams.open_stream(source, wanted)

  # -------------------------------------------------------------------- texts, pixels and latents

  def texts(self, prompts: str | Sequence[str]) -> np.ndarray:
    """Returns prompts as the network reads them [n l d]. Raises UserError for what is no text."""
    return super().texts(_texts(prompts))

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Decodes latents [f h w c] into frames uint8 [F H W 3], or a batch [n f h w c] of them.

    Raises UserError for another shape.
    """
    shape, latent = np.shape(latents), self.experiment.latent
    size = (latent.height, latent.width, latent.channels)
    if len(shape) not in (4, 5) or shape[-3:] != size or 0 in shape:
      raise UserError(f"latents of shape {shape}: expected (frames, {_comma(size)}), or a batch")
    if len(shape) == 5:
      return np.stack([self.decode(row) for row in latents])
    with jax.set_mesh(self.run.mesh):
      return np.concatenate(list(clips.decoded(self, np.asarray(latents)[None])))

  def encode(self, frames: np.ndarray) -> np.ndarray:
    """Encodes frames uint8 [F H W 3] into latents float32 [f h w c], or a batch of them.

    Raises UserError for another shape or dtype, and for frame counts that no video has.
    """
    frames, e = np.asarray(frames), self.experiment
    size = (e.data.height, e.data.width, 3)
    if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-3:] != size:
      raise UserError(
        f"frames {frames.dtype} {frames.shape}: expected uint8 (frames, {_comma(size)}), or a batch"
      )
    count = frames.shape[-4]
    if not count or e.codec.pixel_frames(e.codec.latent_frames(count)) != count:
      near = e.codec.pixel_frames(max(1, e.codec.latent_frames(count)))
      raise UserError(f"{count} frames cannot be encoded; the nearest count is {near}")
    with jax.set_mesh(self.run.mesh):
      batch = frames if frames.ndim == 5 else frames[None]
      latents = np.asarray(self.run.autoencoder.latents(batch), np.float32)
    return latents if frames.ndim == 5 else latents[0]

  # ----------------------------------------------------------------------------------- method

  @property
  def method(self) -> Method:
    """The method at the student's noise levels."""
    return self.run.method

  def with_method(self, **changes) -> "Model":
    """Returns this model, weights and all, with changed fields of its MethodConfig.

    As with_method(window=9, sink=3). Raises UserError for an unknown field or a wrong value.
    """
    known = [field.name for field in dataclasses.fields(MethodConfig)]
    for name in changes.keys() - set(known):
      raise UserError(f"a method has no {name!r}; {nearest(name, known)}")
    e, changes = self.experiment, as_fields(MethodConfig, changes)
    e = dataclasses.replace(e, history=dataclasses.replace(e.history, **changes))
    run = dataclasses.replace(self.run, experiment=e)
    # the same ones: a cached property lies in the instance under its name
    vars(run)["autoencoder"] = self.run.autoencoder
    vars(run)["text_encoder"] = self.run.text_encoder
    return dataclasses.replace(self, run=run)

  # ------------------------------------------------------------------------- kept between calls

  def params(self) -> Params:
    """Returns the network's weights, sharded over the run's mesh; the first call loads them."""
    return self.load_once()

  def sampler(self, frames: int, **sections):
    """Returns VideoModel.sampler's function: one for each of its arguments, compiled once."""
    wanted = (frames, *sorted(sections.items()))
    if wanted not in self._samplers:
      self._samplers[wanted] = super().sampler(frames, **sections)
    return self._samplers[wanted]


def _texts(prompts: str | Sequence[str]) -> list[str]:
  """Returns prompts as a list. Raises UserError for none, and for what is no text."""
  found = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Sequence) else prompts
  for prompt in found:
    if not isinstance(prompt, str):
      raise UserError(f"prompt = {prompt!r}: expected text")
  if not found:
    raise UserError('there is no prompt; give one, as "a red circle moving left"')
  return list(found)


def _comma(size: tuple[int, ...]) -> str:
  return ", ".join(map(str, size))
