"""What every stage of a run shares: the experiment, its directories, devices, log, and the task (codec and text encoder)."""

import dataclasses
import functools
import io
import os
import pathlib

import jax
from jax.sharding import Mesh
import numpy as np

from hiar_jax import config as configs
from hiar_jax import metrics, sharding
from hiar_jax.data import pipeline, store, world
from hiar_jax.errors import UserError
from hiar_jax.experiment import Experiment
from hiar_jax.models import patch_codec, words
from hiar_jax.models.patch_codec import PatchCodec
from hiar_jax.steps.task import Task

# What may differ between the config of a workdir and the one given: it changes no number of the run.
FREE = ("log", "sample", "mesh", "stages_from")
# The groups that data .. causal_init depend on: stages_from takes these from another workdir, so they must agree.
SHARED = ("seed", "data", "codec", "text", "model", "student", "teacher", "trajectories", "causal_init")


@dataclasses.dataclass(frozen=True)
class Run:
  """An experiment at work in its directory."""

  experiment: Experiment
  workdir: pathlib.Path
  mesh: Mesh
  writer: metrics.Writer

  def directory(self, stage: str) -> pathlib.Path:
    """Where a stage keeps its result: in the workdir, or where stages_from has it."""
    if self.experiment.stages_from and stage not in ("distill", "sample"):
      return pathlib.Path(self.experiment.stages_from) / stage
    return self.workdir / stage

  @property
  def sigmas(self) -> np.ndarray:
    return self.experiment.student.sigmas.astype(np.float32)

  @property
  def world(self) -> world.WorldConfig:
    """The shapes world that the data shows. Raises UserError for real videos."""
    data = self.experiment.data
    if data.source != "shapes":
      raise UserError("this needs the truth of the shapes world, but data.source is 'videos'")
    return world.WorldConfig(size=data.size, frames=data.frames, difficulty=data.difficulty)

  @functools.cached_property
  def tokenizer(self) -> words.WordTokenizer:
    if self.experiment.data.source == "shapes":
      return words.WordTokenizer(world.VOCABULARY, self.experiment.text.length)
    captions = pipeline.read_captions(self.directory("data"))
    return words.WordTokenizer(words.vocabulary_of(captions), self.experiment.text.length)

  @functools.cached_property
  def codec(self) -> PatchCodec:
    return load_codec(self.directory("data") / CODEC)

  @functools.cached_property
  def task(self) -> Task:
    """Latents and text of a batch; closes over the fitted codec and the frozen word table."""
    e, codec = self.experiment, self.codec
    table = words.word_table(self.tokenizer.size, e.text.length, e.text.dim)
    side = e.data.size // e.codec.patch
    return Task(
      encode=lambda batch: patch_codec.encode(codec, patch_codec.to_unit(batch["video"])),
      embed=lambda tokens: words.encode(table, tokens),
      frames=e.data.frames, height=side, width=side, channels=e.codec.channels,
    )  # fmt: skip

  def pixels(self, latents) -> np.ndarray:
    """Latents [b f h w c] -> uint8 [b f H W 3]."""
    return patch_codec.to_uint8(jax.jit(patch_codec.decode)(self.codec, latents))

  def clips(self, stage: str, batch: int, keys: tuple[str, ...], salt: int):
    """This process's share of a stage's batches from its data set: the data, or the trajectories."""
    count = jax.process_count()
    if batch % count:
      raise UserError(f"a batch of {batch} cannot be split over {count} processes")
    return pipeline.make_iterator(
      self.directory(stage), batch_size=batch // count, seed=self.experiment.seed + salt, tokenize=self.tokenizer,
      process_index=jax.process_index(), process_count=count, keys=keys,
    )  # fmt: skip

  def held_out(self, count: int) -> list[str]:
    """Prompts that training never showed, repeated as often as needed."""
    known = world.prompts("held_out", self.world)
    step = max(1, len(known) // count)
    return [known[i * step % len(known)] for i in range(count)]


CODEC = "codec.npz"


def save_codec(path: pathlib.Path, codec: PatchCodec) -> None:
  """Atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, mean=codec.mean, basis=codec.basis, scale=codec.scale, patch=codec.patch)
  store.write_atomically(path, buffer.getvalue())


def load_codec(path: pathlib.Path) -> PatchCodec:
  if not path.exists():
    raise UserError(f"{path} is missing: the data stage fits it; run the training command first")
  with np.load(path) as stored:
    arrays = {name: stored[name] for name in stored.files}
  return PatchCodec(arrays["mean"], arrays["basis"], arrays["scale"], patch=int(arrays["patch"]))


def open_run(config, workdir: str | os.PathLike, *, save: bool = True) -> Run:
  """Checks the config against itself and against what the workdir (and stages_from) were made with.

  Raises UserError where they differ in anything that changes a number.
  """
  experiment = configs.build(Experiment, config)
  configs.check_workdir(config, workdir, ignore=FREE)
  if experiment.stages_from:
    _check_shared(config, experiment)
  if save and metrics.is_writer():
    configs.save_resolved(config, workdir)
  workdir = pathlib.Path(workdir)
  return Run(experiment, workdir, sharding.make_mesh(experiment.mesh), metrics.Writer(workdir / "logs"))


def _check_shared(config, experiment: Experiment) -> None:
  stored = configs.read_resolved(experiment.stages_from)
  if stored is None:
    raise UserError(f"stages_from = {experiment.stages_from!r} holds no run; give a workdir that went through causal_init")
  given = configs.to_json(config)
  pick = lambda tree: {**{name: tree.get(name) for name in SHARED}, "history": {"block": tree["history"]["block"]}}
  lines = configs.difference(pick(stored), pick(given))
  if lines:
    raise UserError(
      f"stages_from = {experiment.stages_from!r} was made with another config (stored -> given: {'; '.join(lines)}); "
      "use the stored values, or leave stages_from empty"
    )
