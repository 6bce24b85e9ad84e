"""An experiment as frozen dataclasses: what a config file may say, and nothing else. `config.build(Experiment, config)` makes one.

Each group is documented where its class is; the numbers and their sources are in experiments/.
"""

import dataclasses

import numpy as np

from hiar_jax import flow
from hiar_jax.errors import UserError, at_least
from hiar_jax.history import History
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.patch_codec import PatchCodecConfig
from hiar_jax.sharding import MeshConfig
from hiar_jax.steps.causal_init import CausalInitConfig
from hiar_jax.steps.distill import DistillConfig
from hiar_jax.steps.teacher import TeacherConfig

SOURCES = ("shapes", "videos")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """source `shapes`: `clips` clips of the shapes world of a `difficulty`; `videos`: those in `folder`, at `fps`, cropped to size x size."""

  source: str = "shapes"
  frames: int = 9
  size: int = 32
  seed: int = 0
  difficulty: str = "plain"
  clips: int = 4096
  folder: str = ""
  fps: float = 8.0

  def __post_init__(self):
    at_least(1, clips=self.clips, frames=self.frames, size=self.size)
    if self.source not in SOURCES:
      raise UserError(f"data.source = {self.source!r}: expected one of {', '.join(SOURCES)}")
    if self.source == "videos" and not self.folder:
      raise UserError("data.source = 'videos' needs data.folder, a folder of clips (clip.mp4 beside clip.txt)")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """length: tokens of a prompt; dim: width of the frozen word table."""

  length: int = 24
  dim: int = 64

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The DiT's sizes, for teacher, student and critic alike; channels and text_dim follow from codec and text."""

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  patch: tuple[int, int, int] = (1, 1, 1)
  freq_dim: int = 256
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "xla"
  unroll: int = 1


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  """The student's levels: nominal timesteps, shifted (flow.warped_levels)."""

  timesteps: tuple[float, ...] = (1000, 750, 500, 250)
  shift: float = 5.0

  def __post_init__(self):
    flow.warped_levels(self.timesteps, self.shift)  # says what is wrong with them

  @property
  def sigmas(self) -> np.ndarray:
    return flow.warped_levels(self.timesteps, self.shift)


@dataclasses.dataclass(frozen=True)
class TrajectoriesConfig:
  """`count` guided Euler walks of the teacher over `steps` levels with the student's shift, `batch` at a time."""

  count: int
  batch: int = 64
  steps: int = 48
  guidance: float = 3.0
  dtype: str = "float32"

  def __post_init__(self):
    at_least(1, count=self.count, batch=self.batch, steps=self.steps)

  def kept(self, student: StudentConfig) -> tuple[int, ...]:
    """Indices of the student's levels among the teacher's, whose grid must hold them."""
    nominal = np.asarray((*student.timesteps, 0.0)) / flow.TIMESTEPS
    index = (1 - nominal) * self.steps
    if np.abs(index - index.round()).max() > 1e-6:
      raise UserError(
        f"trajectories.steps = {self.steps}: the teacher's levels must include the student's timesteps {student.timesteps}; "
        "use a multiple of 4 for (1000, 750, 500, 250)"
      )
    return tuple(int(i) for i in index.round())


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The clip that is made at the end: `length` training lengths, for the prompts of a file or `prompts` = `held_out` ones of the world.

  fps, scale: of the files; batch: videos made at once; measure: how many videos metrics.json is measured on.
  """

  prompts: str = "held_out"
  count: int = 8
  length: float = 4.0
  seed: int = 0
  fps: float = 8.0
  scale: int = 8
  batch: int = 32
  measure: int = 54

  def __post_init__(self):
    at_least(1, count=self.count, batch=self.batch, scale=self.scale)


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Steps between scalars, between sample frames, and between checkpoints; how many checkpoints are kept."""

  every: int = 20
  preview_every: int = 500
  checkpoint_every: int = 250
  keep: int = 2

  def __post_init__(self):
    at_least(1, every=self.every, preview_every=self.preview_every, checkpoint_every=self.checkpoint_every, keep=self.keep)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run, from data to video. stages_from: a workdir whose data, teacher, trajectories and causal init are used."""

  seed: int
  data: DataConfig
  codec: PatchCodecConfig
  text: TextConfig
  model: ModelConfig
  student: StudentConfig
  history: History
  teacher: TeacherConfig
  trajectories: TrajectoriesConfig
  causal_init: CausalInitConfig
  distill: DistillConfig
  sample: SampleConfig
  mesh: MeshConfig
  log: LogConfig
  stages_from: str = ""

  def __post_init__(self):
    frames, block = self.data.frames, self.history.block
    if frames % block:
      near = max(block, round(frames / block) * block)
      raise UserError(f"data.frames = {frames} is not whole blocks of history.block = {block} frames; the nearest is {near}")
    if self.data.size % self.codec.patch:
      raise UserError(f"data.size = {self.data.size} is not a multiple of codec.patch = {self.codec.patch}")
    side, patch = self.data.size // self.codec.patch, self.dit.patch
    if side % patch[1] or side % patch[2]:
      raise UserError(f"latents of {side} x {side} (data.size / codec.patch) cannot be cut into model.patch = {patch}")
    if self.distill.forward_kl.steps > len(self.student.timesteps):
      raise UserError(
        f"distill.forward_kl.steps = {self.distill.forward_kl.steps}: the student has {len(self.student.timesteps)} levels"
      )
    self.trajectories.kept(self.student)

  @property
  def dit(self) -> DiTConfig:
    return DiTConfig(**dataclasses.asdict(self.model), channels=self.codec.channels, text_dim=self.text.dim)
