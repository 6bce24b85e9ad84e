"""An experiment as frozen dataclasses: what a config file may say, and nothing else.
`config.build(Experiment, config)` makes one.

Each group is documented where its class is; the numbers and their sources are in experiments/.
"""

import dataclasses

import numpy as np

from hiar_jax import flow
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.components.wan import UMT5TextConfig, WanCodecConfig
from hiar_jax.components.word_table import TextConfig
from hiar_jax.errors import UserError, at_least
from hiar_jax.method import Method
from hiar_jax.models.dit import DiTConfig
from hiar_jax.parallel.mesh import MeshConfig
from hiar_jax.training.causal_init import CausalInitConfig
from hiar_jax.training.distill import DistillConfig
from hiar_jax.training.teacher import TeacherConfig
from hiar_jax.types import LatentShape

SOURCES = ("shapes", "videos", "prompts")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """source `shapes`: `clips` clips of the shapes world of a `difficulty`; `videos`: those in
  `folder`, at `fps`, cropped to `size`;
  `prompts`: no videos, the lines of the file `prompts`, for a teacher that is there already.
  later: share of the shapes world's clips that are cut from further on in a video (WorldConfig);
  videos are cut end to end.

  frames: of a clip, in pixels' time. size: of a frame, one number or (height, width).
  """

  source: str = "shapes"
  frames: int = 9
  size: int | tuple[int, int] = 32
  seed: int = 0
  difficulty: str = "plain"
  later: float = 0.0
  clips: int = 4096
  folder: str = ""
  fps: float = 8.0
  prompts: str = ""

  def __post_init__(self):
    at_least(1, clips=self.clips, frames=self.frames, height=self.height, width=self.width)
    if self.source not in SOURCES:
      raise UserError(f"data.source = {self.source!r}: expected one of {', '.join(SOURCES)}")
    if self.source == "videos" and not self.folder:
      raise UserError(
        "data.source = 'videos' needs data.folder, a folder of clips (clip.mp4 beside clip.txt)"
      )
    if self.source == "prompts" and not self.prompts:
      raise UserError("data.source = 'prompts' needs data.prompts, a file with one prompt a line")

  @property
  def height(self) -> int:
    return self.size if isinstance(self.size, int) else self.size[0]

  @property
  def width(self) -> int:
    return self.size if isinstance(self.size, int) else self.size[1]


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
  """Directories of converted weights that stand for a stage's result; empty: the stage runs.

  base: the bidirectional model of the student's size: its trajectories are sampled, student and
  critic start from it (the teacher stage).
  teacher: the real score of distribution matching, where it is another one than base. student: a
  causal student (the causal_init stage).
  """

  base: str = ""
  teacher: str = ""
  student: str = ""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A DiT's sizes; channels and text_dim follow from codec and text."""

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
  merge_tokens: bool = False
  place_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  """The student's levels: nominal timesteps, shifted (flow.warped_levels)."""

  timesteps: tuple[float, ...] = (1000, 750, 500, 250)
  shift: float = 5.0

  def __post_init__(self):
    flow.shifted_schedule(self.timesteps, self.shift)  # says what is wrong with them

  @property
  def sigmas(self) -> np.ndarray:
    return flow.shifted_schedule(self.timesteps, self.shift)


@dataclasses.dataclass(frozen=True)
class TrajectoriesConfig:
  """`count` guided Euler walks of the teacher over `steps` levels, `batch` at a time; kept are
  their points at the student's timesteps.

  shift: of the walk; 0: the student's, so that the points lie at the student's own levels (see
  `sigmas`).
  pairs: a folder that HiAR's or Self-Forcing's generate_ode_pairs.py wrote, imported instead, at
  the levels that it has.
  """

  count: int
  batch: int = 64
  steps: int = 48
  shift: float = 0.0
  guidance: float = 3.0
  dtype: str = "float32"
  pairs: str = ""

  def __post_init__(self):
    at_least(1, count=self.count, batch=self.batch, steps=self.steps)
    at_least(0, shift=self.shift)

  def sigmas(self, student: StudentConfig) -> np.ndarray:
    """The levels [s + 1] of the points: the student's timesteps under the walk's shift. float64."""
    return flow.shifted_schedule(student.timesteps, self.shift or student.shift)

  def kept(self, student: StudentConfig) -> tuple[int, ...]:
    """Indices of the student's levels among the teacher's, whose grid must hold them."""
    nominal = np.asarray((*student.timesteps, 0.0)) / flow.TIMESTEPS
    index = (1 - nominal) * self.steps
    if np.abs(index - index.round()).max() > 1e-6:
      raise UserError(
        f"trajectories.steps = {self.steps}: the teacher's levels must include the student's "
        f"timesteps {student.timesteps}; "
        "use a multiple of 4 for (1000, 750, 500, 250)"
      )
    return tuple(int(i) for i in index.round())


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The clip that is made at the end: `length` training lengths, for the prompts of a file or
  `prompts` = `held_out` ones of the world.

  fps, scale: of the files; batch: videos made at once; measure: how many videos metrics.json is
  measured on.
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
  """Steps between scalars, between sample frames, and between checkpoints; how many checkpoints are
  kept.
  """

  every: int = 20
  preview_every: int = 500
  checkpoint_every: int = 250
  keep: int = 2

  def __post_init__(self):
    at_least(
      1,
      every=self.every,
      preview_every=self.preview_every,
      checkpoint_every=self.checkpoint_every,
      keep=self.keep,
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One run, from data to video.

  model: of student, critic and base; teacher_model: of weights.teacher, where it has other sizes.
  stages_from: a workdir whose data, teacher, trajectories and causal init are used.
  """

  seed: int
  data: DataConfig
  codec: PatchPCAConfig | WanCodecConfig
  text: TextConfig | UMT5TextConfig
  model: ModelConfig
  student: StudentConfig
  history: Method
  teacher: TeacherConfig
  trajectories: TrajectoriesConfig
  causal_init: CausalInitConfig
  distill: DistillConfig
  sample: SampleConfig
  mesh: MeshConfig
  log: LogConfig
  stages_from: str = ""
  weights: WeightsConfig = WeightsConfig()
  teacher_model: ModelConfig | None = None

  def __post_init__(self):
    self.dit, self.teacher_dit  # noqa: B018  # say what is wrong with their sizes
    self._check_sizes()
    if self.distill.forward_kl.steps > len(self.student.timesteps):
      raise UserError(
        f"distill.forward_kl.steps = {self.distill.forward_kl.steps}: the student has "
        f"{len(self.student.timesteps)} levels"
      )
    self.trajectories.kept(self.student)
    if self.data.source == "prompts" and not self.weights.base:
      raise UserError(
        "data.source = 'prompts' trains no teacher: give weights.base, a directory of converted "
        "weights"
      )
    if (self.data.source == "prompts") != isinstance(self.codec, WanCodecConfig):
      raise UserError(
        f"data.source = {self.data.source!r} with codec.kind = {self.codec.kind!r}: expected "
        "'prompts' with 'wan' only"
      )
    if isinstance(self.codec, WanCodecConfig) != isinstance(self.text, UMT5TextConfig):
      raise UserError(
        f"codec.kind = {self.codec.kind!r} with text.kind = {self.text.kind!r}: expected 'wan' "
        "with 'umt5' only"
      )
    if self.teacher_model and not self.weights.teacher:
      raise UserError("teacher_model is given, but no weights.teacher of that size")

  def _check_sizes(self) -> None:
    data, codec, block = self.data, self.codec, self.history.block
    frames = self.latent_frames(data.frames)
    if (data.frames - 1) % codec.temporal_factor or frames % block:
      near = self.pixel_frames(max(block, round(frames / block) * block))
      of = f"{block} frames" if codec.temporal_factor == 1 else f"{block} latent frames"
      raise UserError(
        f"data.frames = {data.frames} is not whole blocks of history.block = {of}; the nearest is "
        f"{near}"
      )
    if data.height % codec.spatial_factor or data.width % codec.spatial_factor:
      name = "codec.patch = " if codec.kind == "patches" else ""
      raise UserError(f"data.size = {data.size} is not a multiple of {name}{codec.spatial_factor}")
    height, width = data.height // codec.spatial_factor, data.width // codec.spatial_factor
    if height % self.model.patch[1] or width % self.model.patch[2]:
      raise UserError(
        f"latents of {height} x {width} (data.size through the codec) cannot be cut into "
        f"model.patch = {self.model.patch}"
      )

  @property
  def needs_trajectories(self) -> bool:
    """Whether causal init or forward-KL will read them."""
    return not self.weights.student or self.distill.forward_kl.weight > 0

  def latent_frames(self, frames: int) -> int:
    """Latent frames that hold a video of `frames`: the first stands alone."""
    return 1 + -(-(frames - 1) // self.codec.temporal_factor)

  def pixel_frames(self, latent: int) -> int:
    """Frames of a video of `latent` latent frames."""
    return 1 + (latent - 1) * self.codec.temporal_factor

  @property
  def latent(self) -> LatentShape:
    """Sizes of a clip's latents."""
    factor = self.codec.spatial_factor
    height, width = self.data.height // factor, self.data.width // factor
    return LatentShape(self.latent_frames(self.data.frames), height, width, self.codec.channels)

  @property
  def dit(self) -> DiTConfig:
    """Base and critic."""
    return self._dit(self.model)

  @property
  def student_dit(self) -> DiTConfig:
    """The same parameters; but all blocks after a training clip's length share their places, so
    that a video may go on for ever.
    """
    return dataclasses.replace(self.dit, places=(self.dit.places[0], self.history.block))

  @property
  def teacher_dit(self) -> DiTConfig:
    """The real score."""
    return self._dit(self.teacher_model or self.model)

  def _dit(self, model: ModelConfig) -> DiTConfig:
    """The frames of a video's first clip have places of their own; those of later clips share
    theirs.
    """
    frames = self.latent_frames(self.data.frames)
    return DiTConfig(
      **dataclasses.asdict(model),
      channels=self.codec.channels,
      text_dim=self.text.dim,
      places=(frames, frames),
    )
