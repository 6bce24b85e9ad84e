"""What every stage of a run shares: the experiment, its directories, devices, log, and the medium
(codec and text encoder).
"""

import dataclasses
import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np

from hiar_jax import flow
from hiar_jax.components import wan, word_table
from hiar_jax.components.interfaces import Components, Task, decode_pixels
from hiar_jax.components.small import SmallComponents
from hiar_jax.components.wan import WanCodecConfig
from hiar_jax.config.building import build
from hiar_jax.config.workdir import (
  RESOLVED,
  check_workdir,
  difference,
  read_resolved,
  save_resolved,
  to_json,
)
from hiar_jax.data import pipeline, shapes_world, tfds_builder
from hiar_jax.data.trajectories import read_sigmas
from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.parallel.mesh import MeshConfig, check_batch, make_mesh
from hiar_jax.progress import is_writer
from hiar_jax.rollout import sample, teacher_sampler
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.log import Writer

# What may differ between the config of a workdir and the one given: it changes no number of the
# run.
FREE = ("log", "sample", "mesh", "stages_from")
# The groups that data .. causal_init depend on: stages_from takes these from another workdir, so
# they must agree.
SHARED = (
  "seed",
  "data",
  "codec",
  "text",
  "model",
  "student",
  "teacher",
  "trajectories",
  "causal_init",
  "weights",
)
CODEC = "codec.npz"  # of the small worlds, in the data stage's directory


@dataclasses.dataclass(frozen=True)
class Run:
  """An experiment at work in its directory."""

  experiment: Experiment
  workdir: pathlib.Path
  mesh: Mesh

  def directory(self, stage: str) -> pathlib.Path:
    """Where a stage keeps its result: in the workdir, or where stages_from has it."""
    return (
      pathlib.Path(self.experiment.stages_from) if self.borrows(stage) else self.workdir
    ) / stage

  def borrows(self, stage: str) -> bool:
    """Whether a stage's result is that of another workdir."""
    return bool(self.experiment.stages_from) and stage not in ("distill", "sample")

  @property
  def sigmas(self) -> np.ndarray:
    return self.experiment.student.sigmas.astype(np.float32)

  @property
  def point_sigmas(self) -> np.ndarray:
    """The levels of the trajectories: those of the teacher's walk, or those that imported ones
    have.
    """
    e = self.experiment
    if not e.trajectories.pairs or not e.needs_trajectories:
      return e.trajectories.sigmas(e.student).astype(np.float32)
    return np.asarray(read_sigmas(self.directory("trajectories")), np.float32)

  @property
  def world(self) -> shapes_world.WorldConfig:
    """The shapes world that the data shows. Raises UserError for real videos."""
    data = self.experiment.data
    if data.source != "shapes":
      raise UserError(
        f"this needs the truth of the shapes world, but data.source is {data.source!r}"
      )
    if data.height != data.width:
      raise UserError(f"data.size = {data.size}: the shapes world is square, give one number")
    return shapes_world.WorldConfig(
      size=data.height, frames=data.frames, difficulty=data.difficulty, later=data.later
    )

  @functools.cached_property
  def writer(self) -> Writer:
    """The run's log, opened by whoever trains; tools that only read a run leave it alone."""
    return Writer(self.workdir / "logs")

  @functools.cached_property
  def components(self) -> Components:
    e = self.experiment
    if isinstance(e.codec, WanCodecConfig):
      return wan.WanComponents(e.codec, e.text, e.latent)
    if e.data.source == "shapes":
      vocabulary = shapes_world.VOCABULARY
    else:
      vocabulary = word_table.vocabulary_of(pipeline.read_captions(self.directory("data")))
    return SmallComponents(e.text, e.latent, self.directory("data") / CODEC, vocabulary)

  @property
  def task(self) -> Task:
    return self.components.task

  def tokens(self, prompts) -> np.ndarray:
    """What the model reads of prompts: [n l] or [n l d]."""
    return self.components.tokens(prompts)

  def pixels(self, latents) -> np.ndarray:
    """Latents [b f h w c] -> uint8 [b F H W 3]."""
    return decode_pixels(self.components, latents)

  def sampler(self, frames: int, method: Method | None = None):
    """The student's rollout.sample, jitted: `frames` new latent frames in the run's own order,
    window and sink, or in those of `method`.
    """
    e = self.experiment
    return jax.jit(
      sample.make_sampler(
        e.student_dit,
        self.task.embed,
        jnp.asarray(self.sigmas),
        method or e.history,
        key=jax.random.fold_in(jax.random.key(e.seed), 3),
        latent=e.latent,
        frames=frames,
      )
    )

  def teacher_sampler(self, key: jax.Array):
    """The teacher's rollout.teacher_sampler, jitted: its points at the student's timesteps."""
    e, config = self.experiment, self.experiment.trajectories
    sigmas = flow.sigma_schedule(config.steps, config.shift or e.student.shift)
    return jax.jit(
      teacher_sampler.make_sampler(
        e.dit,
        self.task.embed,
        self.task.negative,
        jnp.asarray(sigmas, jnp.float32),
        config.kept(e.student),
        guidance=config.guidance,
        key=key,
        clip=e.latent.clip,
      )
    )

  def clips(self, stage: str, batch: int, keys: tuple[str, ...], salt: int):
    """This process's share of a stage's batches from its data set: the data, or the trajectories.

    With `start` where the model reads it.
    """
    keys = (*keys, "start") if self.experiment.dit.place_embedding else keys
    count = jax.process_count()
    if batch % count:
      raise UserError(f"a batch of {batch} cannot be split over {count} processes")
    return pipeline.make_iterator(
      self.directory(stage),
      batch_size=batch // count,
      seed=self.experiment.seed + salt,
      tokenize=self.components.of_record,
      process_index=jax.process_index(),
      process_count=count,
      keys=keys,
    )

  def preview_tokens(self, count: int = 8) -> np.ndarray:
    """Prompts for sample frames: held-out ones of the shapes world, else the first captions of the
    data.
    """
    if self.experiment.data.source == "shapes":
      prompts = self.held_out(count)
    else:
      prompts = pipeline.read_captions(self.directory("data"))[:count]
    return self.tokens(prompts)

  def held_out(self, count: int) -> list[str]:
    """Prompts that training never showed, spread over all of them, repeated where there are too
    few.
    """
    known = shapes_world.prompts("held_out", self.world)
    return [known[i * len(known) // count] for i in range(count)]


def open_run(config, workdir: str | os.PathLike, *, save: bool = True) -> Run:
  """Checks the config against itself and against what the workdir (and stages_from) were made with.

  save: a run to be trained, whose config goes into the workdir; otherwise one to be read, on
  whatever devices are here. Raises UserError where configs differ in anything that changes a
  number, or where a stage could not run in the end.
  """
  experiment = build(Experiment, config)
  check_workdir(config, workdir, ignore=FREE)
  if experiment.stages_from:
    _check_shared(config, experiment)
  mesh = make_mesh(experiment.mesh if save else MeshConfig())
  run = Run(experiment, pathlib.Path(workdir), mesh)
  if save:
    _check_stages(run)
    if is_writer():
      save_resolved(config, workdir)
  return run


def _check_stages(run: Run) -> None:
  """What a stage would find out only when its turn comes, hours later, in a workdir that by then
  belongs to this config.
  """
  e, data = run.experiment, run.experiment.data
  held = math.inf if e.trajectories.pairs else e.trajectories.count
  count = {"teacher": data.clips, "causal_init": held, "distill": held}
  if data.source == "shapes":
    run.world  # noqa: B018  # raises where such a world cannot be
  elif data.source == "prompts":
    count["teacher"] = len(pipeline.read_prompts(data.prompts))
    run.components.texts  # noqa: B018  # raises where weights are missing
  else:
    count["teacher"] = math.inf  # not known yet
    if not os.path.isdir(data.folder) and not tfds_builder.is_complete(run.directory("data")):
      raise UserError(
        f"data.folder = {data.folder!r} is not a folder; give the one that holds the clips and "
        "their captions"
      )
  if not e.distill.forward_kl.weight:
    count["distill"] = count["teacher"]  # no trajectories are read there
  for name, directory in (("teacher", e.weights.base), ("causal_init", e.weights.student)):
    if directory:  # it stands for the stage
      del count[name]
  for name, there in count.items():
    training = getattr(e, name)
    check_batch(training.batch, training.accumulate, run.mesh, name)
    if training.batch > there:
      of = (
        "trajectories.count"
        if there == held
        else "the prompts of data.prompts"
        if data.source == "prompts"
        else "data.clips"
      )
      raise UserError(
        f"{name}.batch = {training.batch} is more than {of} = {there}; take a smaller batch or "
        "make more"
      )
  if e.sample.prompts != "held_out":
    pipeline.read_prompts(e.sample.prompts)


def _check_shared(config, experiment: Experiment) -> None:
  stored = read_resolved(experiment.stages_from)
  if stored is None:
    raise UserError(
      f"stages_from = {experiment.stages_from!r} holds no run; give a workdir that went through "
      "causal_init"
    )
  given = to_json(config)
  block = lambda tree: {"block": tree.get("history", {}).get("block")}
  pick = lambda tree: {**{name: tree.get(name) for name in SHARED}, "history": block(tree)}
  lines = difference(pick(stored), pick(given))
  if lines:
    raise UserError(
      f"stages_from = {experiment.stages_from!r} was made with another config (stored -> given: "
      f"{'; '.join(lines)}); "
      "use the stored values, or leave stages_from empty"
    )


def read_config(workdir: str) -> config_dict.ConfigDict:
  """The resolved config of a run."""
  stored = read_resolved(workdir)
  if stored is None:
    raise UserError(
      f"--workdir={workdir} holds no run (no {RESOLVED}); train one first, or check the path"
    )
  return config_dict.ConfigDict(stored)
