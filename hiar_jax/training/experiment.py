"""An experiment as frozen dataclasses: the groups and fields that a config file may hold.

`config.building.build(Experiment, config)` makes one and checks it. The numbers of the published
runs, with their sources, are in experiments/.
"""

import dataclasses
import math
from typing import Any

from hiar_jax.components.interfaces import AutoencoderConfig, TextEncoderConfig
from hiar_jax.components.registry import AUTOENCODERS, TEXT_ENCODERS
from hiar_jax.config.building import of_kinds, path_field
from hiar_jax.data.sources import SOURCES, DataConfig
from hiar_jax.errors import (
  MAX_NOISE_SEED,
  MAX_SEED,
  UserError,
  above,
  at_least,
  finite,
  one_of,
  within,
)
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Network, abstract_weights
from hiar_jax.models.registry import NETWORKS
from hiar_jax.packing.orders import ORDERS
from hiar_jax.parallel.mesh import MeshConfig
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.rollout.solvers import SOLVERS
from hiar_jax.training.causal_init import CausalInitConfig
from hiar_jax.training.distill import DistillConfig
from hiar_jax.training.framepack import FramePackConfig
from hiar_jax.training.lora import Adapters
from hiar_jax.training.teacher import TeacherConfig
from hiar_jax.training.trajectories import StudentConfig, TrajectoriesConfig
from hiar_jax.types import LatentShape


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
  """Directories of converted weights that replace a stage's result; empty: the stage runs."""

  # Replaces the teacher stage: the bidirectional model of the student's size, from which the
  # trajectories are sampled and student and critic start.
  base: str = path_field()
  # The real score of distribution matching, where it is not base.
  teacher: str = path_field()
  # Replaces the causal_init stage.
  student: str = path_field()


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The videos that the last stage makes."""

  prompts: str = path_field("held_out")  # or a file, one prompt a line
  count: int = 8  # of held-out prompts
  length: float = 4.0  # in training lengths
  seed: int = 0
  fps: float = 8.0  # of the files
  scale: int = 8  # factor by which the frames of the files are enlarged
  batch: int = 32  # videos made at once
  measure: int = 54  # videos that metrics.json is measured on
  # of a packed model alone:
  order: str = "vanilla"  # of sections (packing.orders)
  steps: int = 16  # of the solver, a section
  guidance: float = 0.0  # g of flow.classifier_free_guidance
  solver: str = dataclasses.field(default="euler", metadata={"since": "2026-11"})
  # of one with discretised history (+D): whether what is sampled is discretised as in training
  discretised: bool = dataclasses.field(default=True, metadata={"since": "2026-11"})

  def __post_init__(self):
    at_least(1, count=self.count, batch=self.batch, scale=self.scale, steps=self.steps)
    above(0, length=self.length, fps=self.fps)
    at_least(0, measure=self.measure)
    finite(guidance=self.guidance)
    within(0, MAX_NOISE_SEED, seed=self.seed)
    one_of(ORDERS, order=self.order)
    one_of(SOLVERS, solver=self.solver)


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """The steps between log lines, previews and checkpoints."""

  every: int = 20
  preview_every: int = 500
  checkpoint_every: int = 250
  keep: int = 2  # checkpoints of a stage

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
  """All settings of a run, from data to video, checked against each other.

  model: sizes of student, critic and base. teacher_model: those of weights.teacher, where they
  differ. stages_from: a workdir whose stages are used, up to the first that depends on a field that
  differs (training.lineage). framepack: trains the teacher on packed context instead of
  distilling a causal student.
  """

  seed: int
  data: DataConfig
  codec: AutoencoderConfig = of_kinds(AUTOENCODERS)
  text: TextEncoderConfig = of_kinds(TEXT_ENCODERS)
  model: Any = of_kinds(NETWORKS)
  student: StudentConfig
  history: MethodConfig
  teacher: TeacherConfig
  trajectories: TrajectoriesConfig
  causal_init: CausalInitConfig
  distill: DistillConfig
  sample: SampleConfig
  mesh: MeshConfig
  log: LogConfig
  stages_from: str = path_field()
  weights: WeightsConfig = WeightsConfig()
  teacher_model: Any = of_kinds(NETWORKS, default=None)
  framepack: FramePackConfig | None = None

  def __post_init__(self):
    within(0, MAX_SEED, seed=self.seed)
    self.dit, self.teacher_dit  # noqa: B018  # building them raises where their sizes are wrong
    kind(self.history)  # raises for an unknown past
    for network in (self.dit, self.teacher_dit, self.stored_student):
      self._check_splits(network)
    self._check_sizes()
    if self.distill.forward_kl.steps > len(self.student.timesteps):
      raise UserError(
        f"distill.forward_kl.steps = {self.distill.forward_kl.steps}: the student has "
        f"{len(self.student.timesteps)} levels"
      )
    if self.framepack:
      self._check_sections(self.framepack)
    elif self.critic_adapters:
      self.critic_adapters.check()
    if not 0 <= self.teacher.frames <= self.latent.frames:
      raise UserError(
        f"teacher.frames = {self.teacher.frames}: clips have {self.latent.frames} latent frames"
      )
    if self.teacher.frames and not self.framepack:
      raise UserError("teacher.frames: the teacher of a causal student is trained on whole clips")
    self.trajectories.kept(self.student)  # raises where the teacher's steps miss the student's
    self._check_data()
    if self.teacher_model and not self.weights.teacher:
      raise UserError("teacher_model is given, but no weights.teacher of that size")

  def _check_splits(self, network: Network) -> None:
    """Raises UserError where the mesh does not divide what it splits of a network."""
    tokens = network.tokens(self.latent.height, self.latent.width)
    whole = {("ring", "sequence"): (tokens, f"the {tokens} tokens of a frame")}
    self.mesh.check({**network.splits(self.latent.height), **whole})

  def _check_sizes(self) -> None:
    """Raises UserError where clips are not whole blocks, or frames not whole patches."""
    data, codec, block = self.data, self.codec, self.history.block
    frames = self.codec.latent_frames(data.frames) - self.given
    if (data.frames - 1) % codec.temporal_factor or frames % block:
      near = self.codec.pixel_frames(self.given + max(block, round(frames / block) * block))
      of = f"{block} frames" if codec.temporal_factor == 1 else f"{block} latent frames"
      of += f" after framepack.given = {self.given}" if self.given else ""
      raise UserError(
        f"data.frames = {data.frames} is not whole blocks of history.block = {of}; the nearest is "
        f"{near}"
      )
    if data.height % codec.spatial_factor or data.width % codec.spatial_factor:
      # a patch codec's factor is its patch, which can be chosen; the VAE's 8 is fixed
      name = "codec.patch = " if hasattr(codec, "patch") else ""
      raise UserError(f"data.size = {data.size} is not a multiple of {name}{codec.spatial_factor}")
    height, width = data.height // codec.spatial_factor, data.width // codec.spatial_factor
    patch = self.dit.patch
    if height % patch[1] or width % patch[2]:
      raise UserError(
        f"latents of {height} x {width} (data.size through the codec) cannot be cut into "
        f"model.patch = {patch}"
      )

  def _check_data(self) -> None:
    """Raises UserError where the data does not have what is trained on it."""
    captions_only, published = self.data.opened.captions_only, not self.codec.fitted
    given = f"data.source = {self.data.source!r}"
    if (captions_only or published) and not self.weights.base:
      raise UserError(
        f"{given} with codec.kind = {self.codec.kind!r} trains no teacher: give weights.base, a "
        "directory of converted weights"
      )
    if captions_only and not published:
      kinds = [kind for kind, codec in AUTOENCODERS.items() if not codec.fitted]
      raise UserError(
        f"{given} with codec.kind = {self.codec.kind!r}, which is fitted on clips: expected "
        f"codec.kind = {' or '.join(map(repr, kinds))}"
      )
    if captions_only == bool(self.framepack) and published:
      names = [name for name, x in SOURCES.items() if x.captions_only != bool(self.framepack)]
      read = "clips, of which it has none" if captions_only else "captions alone, not clips"
      stage = "framepack" if self.framepack else "distill"
      raise UserError(
        f"{given}: the {stage} stage reads {read}; expected data.source = "
        f"{' or '.join(map(repr, names))}"
      )

  def _check_sections(self, framepack: FramePackConfig) -> None:
    """Raises UserError where clips are not whole sections, or sections not blocks."""
    self._check_splits(self.packed_dit)  # raises for a network without packed frames too
    framepack.sections(self.latent.frames)
    if framepack.parsed.discretised:
      framepack.codebook.check(self.latent.height, self.latent.width)
    width = framepack.parsed.generate
    if width != self.history.block:
      raise UserError(
        f"framepack.packing = {framepack.packing!r} makes {width} frames a section: set "
        f"history.block = {width}, not {self.history.block}"
      )
    scales = framepack.distilled_guidance
    if scales and not scales[0] <= self.sample.guidance <= scales[1]:
      raise UserError(
        f"sample.guidance = {self.sample.guidance}: the model learns framepack.distilled_guidance "
        f"= {scales}"
      )
    if framepack.orders and self.sample.order not in framepack.orders:
      raise UserError(
        f"sample.order = {self.sample.order!r}: the model is trained for framepack.orders = "
        f"{framepack.orders}"
      )

  @property
  def given(self) -> int:
    """The latent frames of a clip's start that its model is given, and does not make."""
    return self.framepack.given if self.framepack else 0

  @property
  def stores_latents(self) -> bool:
    """True where the data stage encodes the clips, once: a published codec is too slow for the
    training loop.
    """
    return not self.codec.fitted and not self.data.opened.captions_only

  @property
  def free_fields(self) -> tuple[str, ...]:
    """How the networks are computed, which a run may change on its way: kernel, remat and so on."""
    return tuple(
      f"{group}.{name}" for group in ("model", "teacher_model") for name in self.dit.free
    )

  def seed_of(self, stage: str) -> int:
    """The seed of what a stage draws: its own, or the experiment's."""
    own = getattr(getattr(self, stage, None), "seed", None)
    return self.seed if own is None else own

  @property
  def last_stage(self) -> str:
    """The stage whose weights make videos."""
    return "framepack" if self.framepack else "distill"

  @property
  def packed_dit(self) -> Network:
    """The teacher with the input projections of framepack.packing."""
    config = self.framepack
    return self.dit.packed(config.parsed.pools, guided=bool(config.distilled_guidance))

  @property
  def packed_adapters(self) -> Adapters | None:
    """The adapters of framepack.lora; None where all weights are trained. Projections that the
    teacher lacks are trained as they are.
    """
    if not self.framepack.lora.rank:
      return None
    known, made = (abstract_weights(network).keys() for network in (self.dit, self.packed_dit))
    return Adapters(self.packed_dit, self.framepack.lora, tuple(sorted(made - known)))

  @property
  def critic_adapters(self) -> Adapters | None:
    """The adapters of distill.critic_lora; None where all weights of the critic are trained."""
    return Adapters(self.dit, self.distill.critic_lora) if self.distill.critic_lora.rank else None

  @property
  def one_score(self) -> bool:
    """True where the critic starts from the very weights that the real score has."""
    return self.teacher_dit == self.dit and self.weights.teacher in ("", self.weights.base)

  @property
  def needs_trajectories(self) -> bool:
    """True where causal init or forward KL reads trajectories."""
    return not self.weights.student or self.distill.forward_kl.weight > 0

  @property
  def latent(self) -> LatentShape:
    """The sizes of a training clip's latents."""
    codec, data = self.codec, self.data
    height, width = data.height // codec.spatial_factor, data.width // codec.spatial_factor
    return LatentShape(codec.latent_frames(data.frames), height, width, codec.channels)

  @property
  def sample_frames(self) -> int:
    """The latent frames of a video of sample.length, beside given ones; not in whole blocks yet."""
    # 1e-9: a product such as 1.1 * 10 may lie just above its whole number
    return math.ceil(self.sample.length * (self.latent.frames - self.given) - 1e-9)

  @property
  def teacher_latent(self) -> LatentShape:
    """The sizes of the clips that the teacher is trained on, and makes."""
    return dataclasses.replace(self.latent, frames=self.teacher.frames or self.latent.frames)

  @property
  def dit(self) -> Network:
    """The base model and the critic."""
    return self._network(self.model)

  @property
  def student_dit(self) -> Network:
    """The student: the base model's parameters and those of its packed past, other places.

    The blocks after a training clip's length share the places of one block, so that a video may be
    of any length.
    """
    return self._as_student(self._network(self.model, self.history.block))

  @property
  def stored_student(self) -> Network:
    """The student as its checkpoints describe it."""
    return self._as_student(self.dit)

  def network_of(self, stage: str) -> Network:
    """The network whose parameters a stage's checkpoints hold."""
    if stage == "framepack":
      return self.packed_dit
    return self.stored_student if stage in ("causal_init", "distill") else self.dit

  def _as_student(self, network: Network) -> Network:
    pools = kind(self.history).pools(self.history)
    return network.packed(pools) if pools else network

  @property
  def teacher_dit(self) -> Network:
    """The real score."""
    return self._network(self.teacher_model or self.model)

  def _network(self, model, period: int = 0) -> Network:
    """Returns the network of these sizes, with places for the frames of a video's first clip and
    `period` (0: as many) for later ones.
    """
    frames = self.latent.frames
    return model.network(self.codec.channels, self.text.dim, (frames, period or frames))
