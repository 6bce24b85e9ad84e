"""A student to generate with, from a training run's directory (`from_workdir`) or from a config and
converted weights (`from_config`).
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys

from ml_collections import config_dict
import numpy as np

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.on_disk import CHECKPOINTS
from hiar_jax.checkpoints.training_state import steps_in
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError, at_least, one_of
from hiar_jax.models.frames import Network
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.training import pretrained, samples
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import FREE_GROUPS, Run, open_run, read_config
from hiar_jax.types import DTYPES, Params
from hiar_jax.video import lengths

DECODERS = ("vae", "tiny_vae")


@dataclasses.dataclass(frozen=True)
class ModelChanges:
  """Settings that replace the config's; None keeps the config's.

  height, width: pixels. dtype: of matrix products, and of converted weights (a run's weights keep
  theirs). tile: latents a side.
  """

  height: int | None = None
  width: int | None = None
  dtype: str | None = None
  decoder: str | None = None
  tile: int | None = None

  def __post_init__(self):
    given = {name: x for name, x in dataclasses.asdict(self).items() if x is not None}
    at_least(1, **{name: given[name] for name in ("height", "width") if name in given})
    at_least(0, tile=self.tile or 0)
    one_of(DTYPES, dtype=self.dtype or DTYPES[0])
    one_of(DECODERS, decoder=self.decoder or DECODERS[0])


@dataclasses.dataclass(frozen=True)
class VideoModel:
  """A run with the weights to generate with.

  weights: a directory of converted weights; '' for those of the run's `stage`. stage: '' where the
  model is a config's with converted weights. step: of the stage's checkpoint; None: its last one.
  """

  run: Run
  weights: str
  stage: str
  step: int | None = dataclasses.field(default=None, kw_only=True)

  @property
  def experiment(self) -> Experiment:
    """The run's experiment, with the changes of the command."""
    return self.run.experiment

  @property
  def network(self) -> Network:
    """The network as its weights describe it."""
    e = self.experiment
    return e.packed_dit if e.framepack else e.stored_student

  @property
  def dtype(self) -> str:
    """The dtype of the network's weights in memory: a run's keep theirs."""
    return "float32" if self.stage else self.experiment.model.dtype

  @property
  def name(self) -> str:
    """The last folder of the weights or of the workdir, for metadata and messages."""
    return pathlib.Path(self.weights).resolve().name if self.weights else self.run.workdir.name

  @property
  def origin(self) -> dict[str, str]:
    """Where the weights come from, for the metadata of videos."""
    if self.weights:
      return {"weights": self.name}
    step = {} if self.step is None else {"step": str(self.step)}
    return {"workdir": self.name, "stage": self.stage, **step}

  @functools.cached_property
  def identity(self) -> str:
    """A fingerprint (16 hex digits) of all that changes the numbers of a video, prompt and seed
    apart: weights, sizes, noise levels, method, codec, text encoder.
    """
    e = self.experiment
    content = {
      name: to_json(getattr(e, name))
      for name in ("seed", "model", "student", "history", "codec", "text")
    }
    if e.framepack:
      # settings of `sample` that change the numbers of a packed model's videos
      sampling = e.sample.order, e.sample.steps, e.sample.guidance
      content["framepack"] = [to_json(e.framepack), *sampling]
      if e.sample.solver != "euler":
        content["framepack"].append(e.sample.solver)
      if self.run.codebook:
        content["codebook"] = [self.run.codebook.fingerprint, e.sample.discretised]
    for group in ("codec", "text"):
      # paths: the same weights in another place are the same; fingerprints of them follow below
      for name in ("weights", "cache"):
        content[group].pop(name, None)
    if self.weights:
      content["weights"] = weights.describe(self.weights, e.dit.kind).fingerprint
    else:
      steps = steps_in(self.run.directory(self.stage) / CHECKPOINTS)[-1:] or [""]
      step = steps[0] if self.step is None else self.step
      # Weights of a run have no fingerprint: its config without the keys that may be changed
      # between calls (FREE_GROUPS), and the step, stand for them.
      config = read_config(self.run.workdir).to_dict()
      trained_with = {key: value for key, value in config.items() if key not in FREE_GROUPS}
      content["weights"] = [self.stage, str(step), to_json(trained_with)]
    for group, part in (("codec", self.run.autoencoder), ("text", self.run.text_encoder)):
      if part.identity:
        content[group]["weights"] = part.identity
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

  def params(self) -> Params:
    """Loads the network's weights, sharded over the run's mesh.

    Raises UserError where they are missing or of another size.
    """
    if self.weights:
      return pretrained.load_published(self.run, self.weights, self.network, self.dtype)
    return pretrained.load_weights(self.run, self.stage, self.step)

  def prepare_texts(self, prompts: list[str]) -> None:
    """Encodes the prompts that need an encoder; prints warnings about unknown words to stderr."""
    # not the negative prompt: the student runs without guidance
    self.run.text_encoder.prepare(prompts)
    for prompt in prompts:
      samples.print_warnings(self.run, prompt)

  def texts(self, prompts: Sequence[str]) -> np.ndarray:
    """Returns prompts as the network reads them [n l d], prepared as by prepare_texts."""
    self.prepare_texts(list(prompts))
    return self.run.texts(list(prompts))

  def sampler(self, frames: int, **sections):
    """Returns generate(params, texts, seeds, given=None) -> latents [b given+frames h w c], jitted.

    given: conditioning latents [b f h w c], one frame's or whole blocks'. Of a packed model any
    frames, and `behind` may follow (rollout.packed). sections: as Run.sampler's order and others.
    """
    return self.run.sampler(frames, **sections)


def from_workdir(
  workdir: str,
  stage: str | None,
  changes: ModelChanges,
  *,
  step: int | None = None,
  needed: bool = True,
) -> VideoModel:
  """Opens a run of hiar_jax.train, to generate with the weights of one of its stages (None: the
  last one), as they were at a step (None: when it was finished).

  needed: as from_config's. Raises UserError where there is none, where the stage is not finished
  and no step is given, or where the changes do not suit it.
  """
  run = open_run(read_config(workdir), workdir, save=False)
  run = dataclasses.replace(run, experiment=_with_changes(run.experiment, changes))
  last = run.experiment.last_stage
  if stage and (stage == "framepack") != (last == "framepack"):
    raise UserError(f"--stage={stage}: the run {workdir} has no such stage; its last is {last}")
  stage = stage or last
  if stage != last:
    print(f"weights of {workdir}: of {stage}, not of its last stage {last}", file=sys.stderr)
  wanted = pretrained.step_of(run, stage, step) if needed else step
  return VideoModel(run, "", stage, step=wanted)


def from_config(
  config: config_dict.ConfigDict, directory: str | None, changes: ModelChanges, needed: bool = True
) -> VideoModel:
  """Opens a config's experiment with converted weights.

  directory: holds dit/; vae/ (or tiny_vae/), umt5/ and tokenizer/ are taken from it too where it
  has them, else from the config's directories. By default the config's weights.student.
  needed: False where the weights will not be loaded, and may be missing.

  Raises UserError where weights are missing, or where the changes do not suit the config.
  """
  experiment = build(Experiment, config)
  directory = directory or experiment.weights.student or ""
  if needed and not directory:
    raise UserError(
      "--weights is missing; give a directory of converted weights (python -m hiar_jax.convert "
      "makes one)"
    )
  experiment.codec.with_weights(directory)  # raises for a codec that has none
  if needed:
    weights.describe(directory, experiment.dit.kind)  # raises where something is missing
  experiment = _with_changes(experiment, changes)
  codec, text = experiment.codec.with_weights(directory), experiment.text.with_weights(directory)
  experiment = dataclasses.replace(experiment, codec=codec, text=text)
  # a run without a workdir: nothing is read from it or written to it. The experiment's mesh is that
  # of its training; here weights and videos are split over the devices that there are.
  run = Run(experiment, pathlib.Path(), make_mesh(MeshConfig(data=1, fsdp=-1)))
  model = VideoModel(run, os.fspath(directory), "")
  if needed:
    pretrained.check_sizes(run, model.weights, model.network)  # before any text is encoded
    _tell_base(experiment, model.weights)
  return model


def _tell_base(e: Experiment, directory: str) -> None:
  """Says on stderr that weights are those of the config's base model where they are: the natural
  slip, `weights/wan_1_3b` for `weights/hiar`.
  """
  base, kind = os.path.expanduser(e.weights.base), e.dit.kind
  if e.framepack or not base or not weights.exists(base, kind):
    return
  if weights.describe(base, kind).fingerprint == weights.describe(directory, kind).fingerprint:
    print(
      f"note: {directory} holds the weights of the config's base model (weights.base = {base}), "
      "which is bidirectional; block by block its videos are no good: give those of a student",
      file=sys.stderr,
    )


def _with_changes(e: Experiment, changes: ModelChanges) -> Experiment:
  """The experiment with the changes. Raises UserError where they do not suit its codec."""
  if changes.height or changes.width:
    height, width = changes.height or e.data.height, changes.width or e.data.width
    # the autoencoder's factor times the DiT's patch: 16 pixels for Wan2.1
    lengths.check_sides(height, width, e.codec.spatial_factor * max(e.dit.patch))
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, size=(height, width)))
  if changes.dtype:
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, dtype=changes.dtype))
  if changes.decoder or changes.tile is not None:
    codec = e.codec.with_options(changes.decoder, changes.tile)
    e = dataclasses.replace(e, codec=codec)
  return e
