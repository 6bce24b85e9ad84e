"""A student to generate with: from a training run's directory, or from a config and converted
weights, at the size that is asked for.
"""

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
from hiar_jax.components.wan import WanCodecConfig, WanComponents, tiling_of
from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.data import prompt_texts
from hiar_jax.errors import UserError
from hiar_jax.models import taehv, umt5, vae
from hiar_jax.parallel.mesh import make_mesh
from hiar_jax.planning import costs
from hiar_jax.training import pretrained
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import FREE, Run, open_run, read_config
from hiar_jax.types import Params
from hiar_jax.video import lengths

DECODERS = ("vae", "tiny_vae")
LEAST_TILE = 4  # a quarter of it is the seam


@dataclasses.dataclass(frozen=True)
class ModelChanges:
  """What a command may want otherwise than the config: pixels, dtype, decoder, its tiles in
  latents; None: as it is.

  dtype: of the products, and of converted weights; those of a run stay as they were trained.
  """

  height: int | None = None
  width: int | None = None
  dtype: str | None = None
  decoder: str | None = None
  tile: int | None = None


@dataclasses.dataclass(frozen=True)
class VideoModel:
  """run: the experiment and its medium.

  weights: a directory of converted weights; '' for those of the run's `stage`.
  """

  run: Run
  weights: str
  stage: str

  @property
  def experiment(self) -> Experiment:
    return self.run.experiment

  @property
  def codec(self) -> str:
    codec = self.experiment.codec
    return _kind(codec) if isinstance(codec, WanCodecConfig) else codec.kind

  @property
  def name(self) -> str:
    """Of the run or the weights, for people."""
    return pathlib.Path(self.weights).resolve().name if self.weights else self.run.workdir.name

  @functools.cached_property
  def identity(self) -> str:
    """Differs where anything differs that changes a number of a video: weights, sizes, levels,
    history, codec, text encoder.
    """
    e = self.experiment
    told = {
      name: to_json(getattr(e, name))
      for name in ("seed", "model", "student", "history", "codec", "text")
    }
    for group in ("codec", "text"):
      # places on this disk; the fingerprints below say what lies there
      for name in ("weights", "cache"):
        told[group].pop(name, None)
    if self.weights:
      told["weights"] = weights.fingerprint(self.weights, "dit")
    else:
      steps = [
        path.name
        for path in (self.run.directory(self.stage) / "checkpoints").glob("*")
        if path.name.isdigit()
      ]
      made_with = {
        key: value
        for key, value in read_config(self.run.workdir).to_dict().items()
        if key not in FREE
      }
      told["weights"] = [self.stage, max(steps, key=int, default=""), to_json(made_with)]
    if isinstance(e.codec, WanCodecConfig):
      told["codec"]["weights"] = weights.fingerprint(e.codec.weights, _kind(e.codec))
      told["text"]["weights"] = self.run.components.texts.identity
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

  def params(self) -> Params:
    """The network's weights, over the run's devices.

    Raises UserError where they are missing or of another size.
    """
    e = self.experiment
    if self.weights:
      return pretrained.load_published(self.run, self.weights, e.dit, e.model.dtype)
    return pretrained.load_weights(self.run, self.stage)

  def prepare_texts(self, prompts: list[str]) -> None:
    """Says what the model will not understand, and encodes what needs an encoder of its own, all at
    once: it is then out of memory.
    """
    if isinstance(self.run.components, WanComponents):
      self.run.components.texts.fill(prompts)
    for prompt in prompts:
      for line in self.run.components.remarks(prompt):
        print(line, file=sys.stderr)

  def texts(self, prompts: list[str]) -> np.ndarray:
    """[n l] or [n l d], for prompts that were prepared."""
    if not isinstance(self.run.components, WanComponents):
      return self.run.tokens(prompts)
    return prompt_texts.pad(
      [self.run.components.texts.rows(prompt) for prompt in prompts], self.experiment.text.length
    )

  def generator(self, frames: int):
    """generate(params, texts, seeds, given) -> latents [b given + frames h w c]; given latents are
    None, one frame's, or whole blocks'.
    """
    return self.run.sampler(frames)

  def plan(self, frames: int, given: int, batch: int) -> costs.CostPlan:
    """What `frames` new latent frames after `given` ones would cost."""
    e = self.experiment
    small = not isinstance(e.codec, WanCodecConfig)
    request = costs.JobSize(
      dit=e.student_dit,
      method=e.history,
      levels=len(self.run.sigmas) - 1,
      frames=frames,
      height=e.latent.height,
      width=e.latent.width,
      batch=batch,
      given=given,
      text=e.text.length,
      dtype=e.model.dtype,
      vae=None
      if small
      else _stored(
        e.codec.weights,
        _kind(e.codec),
        taehv.TinyVAEConfig() if e.codec.tiny else vae.VAEConfig(),
      ),
      umt5=None if small else _stored(e.text.weights, "umt5", umt5.UMT5Config()),
      tiling=None if small else tiling_of(e.codec),
    )
    return costs.make(request, self.run.mesh)


def from_workdir(workdir: str, stage: str, changes: ModelChanges) -> VideoModel:
  """A run that hiar_jax.train made.

  Raises UserError where there is none, or where it cannot be changed so.
  """
  run = open_run(read_config(workdir), workdir, save=False)
  return VideoModel(
    dataclasses.replace(run, experiment=_changed(run.experiment, changes)), "", stage
  )


def from_config(
  config: config_dict.ConfigDict, directory: str | None, changes: ModelChanges, needed: bool = True
) -> VideoModel:
  """A config's experiment with the weights in `directory`, default its weights.student; for a plan
  they are not `needed`.

  The autoencoder and the text encoder are taken from there too, where they are there; else from
  where the config says.
  """
  experiment = build(Experiment, config)
  directory = directory or experiment.weights.student or ""
  if needed and not directory:
    raise UserError(
      "--weights is missing; give a directory of converted weights (python -m hiar_jax.convert "
      "makes one)"
    )
  if not isinstance(experiment.codec, WanCodecConfig):
    raise UserError(
      f"codec.kind = {experiment.codec.kind!r} is fitted by a run: give --workdir, a trained run, "
      "instead of --config"
    )
  if needed:
    weights.describe(directory, "dit")  # says what is missing
  experiment = _changed(experiment, changes)
  codec, text = experiment.codec, experiment.text
  if directory and weights.exists(directory, _kind(codec)):
    codec = dataclasses.replace(codec, weights=directory)
  if directory and weights.exists(directory, "umt5"):
    text = dataclasses.replace(text, weights=directory)
  experiment = dataclasses.replace(experiment, codec=codec, text=text)
  return VideoModel(
    Run(experiment, pathlib.Path(), make_mesh(experiment.mesh)), os.fspath(directory), ""
  )


def _changed(e: Experiment, changes: ModelChanges) -> Experiment:
  """The experiment as the command wants it."""
  if changes.height or changes.width:
    height, width = changes.height or e.data.height, changes.width or e.data.width
    lengths.check_sides(height, width, e.codec.spatial_factor * max(e.model.patch))
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, size=(height, width)))
  if changes.dtype:
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, dtype=changes.dtype))
  if changes.decoder or changes.tile is not None:
    if not isinstance(e.codec, WanCodecConfig):
      raise UserError(
        f"--decoder and --tile are for Wan's autoencoder; this run's codec is {e.codec.kind!r}"
      )
    tiny, tile = (
      changes.decoder == "tiny_vae" if changes.decoder else e.codec.tiny,
      e.codec.tile if changes.tile is None else changes.tile,
    )
    if 0 < tile < LEAST_TILE:
      raise UserError(
        f"--tile={tile}: expected at least {LEAST_TILE} latents a side ({8 * LEAST_TILE} pixels), "
        "or 0 for whole frames"
      )
    if tiny and tile:
      raise UserError(
        f"--tile={tile}: the tiny autoencoder decodes whole frames; leave --tile out, or use "
        "--decoder=vae"
      )
    e = dataclasses.replace(e, codec=dataclasses.replace(e.codec, tiny=tiny, tile=tile))
  return e


def _kind(codec: WanCodecConfig) -> str:
  return "tiny_vae" if codec.tiny else "vae"


def _stored(directory: str, kind: str, published):
  """The config of weights that are there, else the published one: a plan needs no weights."""
  return (
    weights.read_config(directory, kind)
    if directory and weights.exists(directory, kind)
    else published
  )
