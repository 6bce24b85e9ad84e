"""A run, which every stage is given: the experiment with its directories, devices, log and encoders
of texts and pixels.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict
import numpy as np

from hiar_jax import flow
from hiar_jax.components.interfaces import Autoencoder, TextEncoder
from hiar_jax.components.word_table import vocabulary_of
from hiar_jax.config.building import build
from hiar_jax.config.workdir import RESOLVED, read_resolved, save_resolved
from hiar_jax.data import pipeline, shapes_world
from hiar_jax.data.prompt_texts import tokens_of
from hiar_jax.data.sources import Source
from hiar_jax.data.trajectories import read_sigmas
from hiar_jax.errors import UserError
from hiar_jax.files import check_name
from hiar_jax.method import Method, MethodConfig
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.orders import steps_of
from hiar_jax.parallel.mesh import MeshConfig, everywhere, make_mesh, replicated
from hiar_jax.parallel.rules import Rules, tree_shardings
from hiar_jax.progress import is_writer
from hiar_jax.rollout import packed, sample, teacher_sampler
from hiar_jax.rollout.noise import seed_key
from hiar_jax.training import checks, lineage, origins, places, starts
from hiar_jax.training.device_mesh import open_mesh
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.lineage import FREE_GROUPS
from hiar_jax.training.log import Writer
from hiar_jax.training.origins import Origins
from hiar_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Run:
  """An experiment with its workdir and its devices. taken: stages of stages_from."""

  experiment: Experiment
  workdir: pathlib.Path
  mesh: Mesh
  taken: lineage.Borrowed = lineage.Borrowed()

  def directory(self, stage: str) -> pathlib.Path:
    """Returns the directory of a stage's result, in the workdir or in that of the run that made
    it.
    """
    return lineage.place_of(self.experiment, self.workdir, self.taken, stage)

  def borrows(self, stage: str) -> bool:
    """Returns True where a stage's result is read from another workdir (stages_from)."""
    return stage in self.taken.stages

  @property
  def lender(self) -> "Run | None":
    """The run that stages_from names, which may have stages of another one itself; None where
    nothing is taken from there.
    """
    if not self.taken.stages:
      return None
    workdir = pathlib.Path(self.experiment.stages_from)
    return Run(self.taken.lender, workdir, self.mesh, self.taken.theirs)

  def shardings(self, shapes: PyTree, rules: Rules) -> PyTree:
    """Returns how a tree of these shapes lies on the mesh (parallel.rules)."""
    return tree_shardings(shapes, self.mesh, rules, min_shard=self.experiment.mesh.min_shard)

  @property
  def sigmas(self) -> np.ndarray:
    """The student's noise levels [s + 1], float32."""
    return self.experiment.student.sigmas.astype(np.float32)

  @property
  def method(self) -> Method:
    """The student's method at its noise levels."""
    return self.experiment.history.at(self.sigmas)

  @property
  def point_sigmas(self) -> np.ndarray:
    """The noise levels of the trajectories' points [s + 1], float32: the teacher sampler's, or
    those stored with imported trajectories.
    """
    e = self.experiment
    if not e.trajectories.pairs or not e.needs_trajectories:
      return e.trajectories.sigmas(e.student).astype(np.float32)
    return np.asarray(read_sigmas(self.directory("trajectories")), np.float32)

  @property
  def source(self) -> Source:
    """Where the training data comes from."""
    return self.experiment.data.opened

  @property
  def world(self) -> shapes_world.WorldConfig:
    """The shapes world that the data is drawn from. Raises UserError for real videos."""
    world = self.source.world
    if world is None:
      source = self.experiment.data.source
      raise UserError(
        f"this needs the truth of the shapes world, but data.source is {source!r}; a run's own "
        "sample/metrics.json says how its videos compare with the footage (docs/own_clips.md)"
      )
    return world

  def check(self) -> None:
    """Raises UserError for what a stage would notice only hours later (training.checks)."""
    e = self.experiment
    if self.source.captions_only or e.stores_latents:
      self.text_encoder  # noqa: B018  # raises where weights are missing
    if e.stores_latents:
      self.autoencoder.identity  # noqa: B018  # the same
    checks.check_stages(e, self.mesh, self.source.count(self.directory("data")))

  @functools.cached_property
  def writer(self) -> Writer:
    """The run's log, opened (and created) at first use, so tools that only read a run make none."""
    return Writer(self.workdir / "logs")

  def words(self) -> tuple[str, ...]:
    """Returns the words of the data, on which a text encoder may be fitted."""
    # where the source does not say, only words that a caption of the data holds are ever learnt
    return self.source.words or vocabulary_of(self.source.captions(self.directory("data")))

  @property
  def origins(self) -> Origins:
    """What was fitted on the data, and which published weights take part."""
    data = self.directory("data")
    lent = (data.parent / origins.FOLDER,) if self.borrows("data") else ()
    return Origins(self.experiment, self.workdir, (*lent, data))

  def check_origins(self, lent: Sequence[str] | None = None) -> None:
    """Raises UserError where this run, or one that made a stage of it, has been trained with other
    words, another codec or other weights than those of now.

    lent: the stages that another run takes from this one; None: it is to be trained.
    """
    if self.lender:
      self.lender.check_origins([x for x in self.taken.stages if lent is None or x in lent])
    if lent is None or not all(self.borrows(stage) for stage in lent):
      self.origins.check(lent)

  @functools.cached_property
  def text_encoder(self) -> TextEncoder:
    """The text encoder, opened when it is first used."""
    config = self.experiment.text
    return config.open(self.origins.holder(config), self.words)

  @functools.cached_property
  def autoencoder(self) -> Autoencoder:
    """The autoencoder, opened when it is first used: the data stage may have to fit it."""
    config = self.experiment.codec
    return config.open(self.origins.holder(config))

  @functools.cached_property
  def codebook(self) -> Codebook | None:
    """The codebook of discretised history, read when it is first used; None without +D."""
    config = self.experiment.framepack
    if config is None or not config.parsed.discretised:
      return None
    return config.codebook.open(self.directory("codebook"), self.experiment.codec.channels)

  def texts(self, prompts) -> np.ndarray:
    """Returns prompts as the network reads them [n l d]."""
    return np.asarray(self.text_encoder.embed(self.text_encoder.tokens(prompts)))

  @functools.cached_property
  def negative(self) -> jax.Array:
    """The text [1 l d] of the negative prompt, on every device of the mesh."""
    return jax.device_put(self.texts([self.text_encoder.negative_prompt]), replicated(self.mesh))

  def encode(self, batch: Batch) -> Batch:
    """Returns a batch with `text` [b l d] for `tokens`, `latents` [b f h w c] for `video`, and
    `start` in latent frames.
    """
    encoded = {name: x for name, x in batch.items() if name not in ("tokens", "video")}
    if "video" in batch:
      encoded["latents"] = self.autoencoder.encode(batch["video"])
    if "start" in batch:
      encoded["start"] = self.latent_starts(batch["start"])
    return {**encoded, "text": self.text_encoder.embed(batch["tokens"])}

  def latent_starts(self, starts):
    """Returns the latent frames [b] of a video before the pixel frames `starts` [b]."""
    codec = self.experiment.codec
    if codec.temporal_factor == 1:
      return starts
    return (starts > 0) * codec.latent_frames(starts)

  def pixels(self, latents) -> np.ndarray:
    """Decodes latents [b f h w c] to uint8 [b F H W 3]."""
    return np.concatenate(list(self.autoencoder.pieces(everywhere(latents, self.mesh))), axis=1)

  def sampler(
    self,
    frames: int,
    method: MethodConfig | None = None,
    *,
    order: str = "",
    loop: bool = False,
    ended: bool = False,
    watched: bool = False,
  ):
    """Returns the sampler of the trained model, jitted, for `frames` new latent frames: the
    student's (rollout.sample) or the packed model's (rollout.packed).

    method: a row that replaces the run's own; not for a packed model. Of a packed model alone:
    order: of its sections; '' for the config's. loop: the video comes back to its start. ended: it
    will be given frames behind the new ones. watched: it yields after each step of the order
    (rollout.packed.make_stepper).
    """
    e = self.experiment
    if e.framepack is None:
      history = (method or e.history).at(self.sigmas)
      shape = dataclasses.replace(e.latent, frames=frames)
      return jax.jit(sample.make_sampler(e.student_dit, history, key=self.noise_key, shape=shape))
    sections = frames // e.framepack.parsed.generate
    steps = steps_of(order or e.sample.order, sections, ended=ended or loop)
    if watched:
      return packed.make_stepper(self.sections(), steps, frames, loop=loop)
    return jax.jit(packed.make_sampler(self.sections(), steps, frames, loop=loop))

  @property
  def noise_key(self) -> jax.Array:
    """The key of the noise that videos are made of."""
    # 3 in the seed's fold_in is this noise; those of the stages are in updates.KEY_OFFSETS
    return jax.random.fold_in(seed_key(self.experiment.seed), 3)

  def sections(self) -> packed.SectionSampler:
    """Returns what makes the sections of the packed model."""
    e, config = self.experiment, self.experiment.framepack
    return packed.SectionSampler(
      network=e.packed_dit,
      schedule=config.parsed,
      history=config.history,
      sigmas=jnp.asarray(flow.sigma_schedule(e.sample.steps, config.shift), jnp.float32),
      negative=self.texts([self.text_encoder.negative_prompt]),
      guidance=e.sample.guidance,
      distilled=bool(config.distilled_guidance),
      key=self.noise_key,
      frame=(e.latent.height, e.latent.width, e.latent.channels),
      published=config.published,
      solver=e.sample.solver,
      codebook=self.codebook if e.sample.discretised else None,
    )

  def teacher_sampler(self, key: jax.Array):
    """Returns the teacher's sampler (rollout.teacher_sampler), jitted; its trajectories [b points f
    h w c] hold the points at the student's timesteps.
    """
    e = self.experiment
    config = e.trajectories
    sigmas = flow.sigma_schedule(config.steps, config.shift or e.student.shift)
    return jax.jit(
      teacher_sampler.make_sampler(
        e.dit,
        self.texts([self.text_encoder.negative_prompt]),
        jnp.asarray(sigmas, jnp.float32),
        config.kept(e.student),
        guidance=config.guidance,
        key=key,
        clip=e.teacher_latent.clip,
        solver=config.solver,
      )
    )

  def clips(
    self, stage: str, batch: int, keys: tuple[str, ...], salt: int, seed: int | None = None
  ):
    """Returns an iterator over this process's rows of the batches of a stage's data set.

    stage: `data` or `trajectories`; batch: global; keys: fields beside the tokens, to which `start`
    is added where the model embeds places; salt: added to the seed of the order, by default
    the experiment's. Raises UserError
    where the batch does not divide by the number of processes.
    """
    if self.experiment.dit.reads_start:
      keys = (*keys, "start")
    count = jax.process_count()
    if batch % count:
      raise UserError(f"a batch of {batch} cannot be split over {count} processes")
    texts, length = self.text_encoder, self.experiment.text.length
    return pipeline.make_iterator(
      self.directory(stage),
      batch_size=batch // count,
      seed=(self.experiment.seed if seed is None else seed) + salt,
      tokenize=lambda record: tokens_of(record, texts, length),
      process_index=jax.process_index(),
      process_count=count,
      keys=keys,
    )

  def preview_prompts(self, count: int = 8) -> list[str]:
    """Returns up to `count` prompts for previews: held-out ones of the shapes world, else captions
    spread over the data, each once.
    """
    if self.source.world is not None:
      return self.held_out(count)
    captions = dict.fromkeys(pipeline.read_captions(self.directory("data")))
    return pipeline.spread(list(captions), count)

  def held_out(self, count: int) -> list[str]:
    """Returns `count` prompts that are not in the training data, evenly spaced in their list and
    repeated where there are too few.
    """
    known = shapes_world.prompts("held_out", self.world)
    return [known[i * len(known) // count] for i in range(count)]


def open_run(config, workdir: str | os.PathLike, *, save: bool = True, extend: bool = False) -> Run:
  """Opens a run after checking its config, also against those of the workdir and of stages_from.

  save: True for a run to be trained, whose config is written to the workdir; False for one to be
  read, on all devices present. extend: the stage that was trained last may get more steps, another
  learning rate and so on (lineage.EXTENDABLE). Raises UserError where configs differ in anything
  that changes a number of a stage that has begun, or where a later stage could not run.
  """
  if save:
    check_name(workdir, f"--workdir={os.fspath(workdir)}", checkpoints=True)
  experiment = build(Experiment, places.located(config, workdir, typed=save))
  renamed = functools.partial(experiment.data.opened.renamed, pathlib.Path(workdir) / "data")
  ignore = (*FREE_GROUPS, *experiment.free_fields, *origins.moved(workdir))
  change = lineage.change(config, workdir, ignore, renamed=renamed, extend=extend, typed=save)
  taken = lineage.borrowed(experiment, workdir)
  mesh = open_mesh(experiment) if save else make_mesh(MeshConfig())
  run = Run(experiment, pathlib.Path(workdir), mesh, taken)
  if save:
    run.check()
    if is_writer():
      _begin(run, config, change, taken)
  return run


def _begin(run: Run, config, change: lineage.Change, taken: lineage.Borrowed) -> None:
  """Writes the config and a record of this start to the workdir; says on stderr what is unusual."""
  if change.lines or read_resolved(run.workdir) is None:  # once
    checks.print_notes(run.experiment)
  for said in taken.notes(run.experiment.stages_from) + change.notes(run.workdir):
    print(said, file=sys.stderr)
  change.begin(run.workdir)
  before = read_resolved(run.workdir)
  stored = places.as_stored(config, run.workdir, before)
  if change.keeps_samples:
    stored["sample"] = before["sample"]  # describes those that are there
  save_resolved(stored, run.workdir)
  starts.keep(run.workdir, run.mesh)


def read_config(workdir: str) -> config_dict.ConfigDict:
  """Reads the resolved config of a run. Raises UserError where the workdir holds none."""
  stored = read_resolved(workdir)
  if stored is None:
    raise UserError(
      f"--workdir={workdir} holds no run (no {RESOLVED}); train one first, or check the path"
    )
  return config_dict.ConfigDict(stored)
