"""The experiments at their own size, of shapes alone: no weights, no files."""

import copy
import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.components.patch_pca import PatchPCA
from hiar_jax.components.wan_autoencoder import WanAutoencoder, WanCodecConfig
from hiar_jax.components.word_table import WordTable
from hiar_jax.config.building import build
from hiar_jax.data import shapes_world
from hiar_jax.models import taehv, vae
from hiar_jax.planning.abstract_run import AbstractRun, ZeroTexts, shape
from hiar_jax.training import samples
from hiar_jax.training.experiment import Experiment

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
VARIANTS = {"shapes": ("main", "full", "smoke")}


@functools.cache
def experiments() -> dict[str, Experiment]:
  """By their names on a command line, without .py: `shapes`, `shapes:smoke`."""
  found = {}
  for path in sorted(FOLDER.glob("[!_]*.py")):
    get_config = importlib.import_module(f"experiments.{path.stem}").get_config
    for variant in VARIANTS.get(path.stem, ()):
      name = path.stem if variant == "main" else f"{path.stem}:{variant}"
      found[name] = build(Experiment, get_config(variant))
    if path.stem not in VARIANTS:
      found[path.stem] = build(Experiment, get_config())
  return found


# -------------------------------------------------------------------------- a part of an experiment


class Unread:
  """Stands for a group that a program has not named: reading it fails."""

  def __getattr__(self, name: str):
    raise AssertionError(f"a program reads {name!r} of a group that it does not name")

  def __bool__(self) -> bool:
    return self.anything


def only(e: Experiment, groups: tuple[str, ...]) -> Experiment:
  """The experiment with these groups, and no other."""
  others = [field.name for field in dataclasses.fields(e) if field.name not in groups]
  return changed(e, **{name: Unread() for name in others})


def changed(e: Experiment, **groups) -> Experiment:
  """dataclasses.replace without the checks, which read all groups."""
  part = copy.copy(e)
  for name, group in groups.items():
    object.__setattr__(part, name, group)
  return part


def without_places(e: Experiment) -> Experiment:
  """Without the directories of weights: they change no program."""
  if not is_wan(e):
    return e
  codec = dataclasses.replace(e.codec, weights="")
  return changed(e, codec=codec, text=dataclasses.replace(e.text, weights="", cache=""))


def is_wan(e: Experiment) -> bool:
  """Or of the small worlds."""
  return isinstance(e.codec, WanCodecConfig)


# ------------------------------------------------------------------------------------------ the run


class WanShapes(WanAutoencoder):
  """With shapes for the weights."""

  @functools.cached_property
  def network(self) -> tuple:
    module, config = (taehv, taehv.TinyVAEConfig()) if self.config.tiny else (vae, vae.VAEConfig())
    dtype = getattr(jnp, self.config.dtype)
    return module, dataclasses.replace(config, dtype=dtype), module.abstract_params(config)


def unfitted(codec) -> PatchPCA:
  """The codec of a small world, fitted on nothing."""
  numbers, zeros = 3 * codec.patch**2, functools.partial(np.zeros, dtype=np.float32)
  basis = zeros((numbers, codec.channels))
  return PatchPCA(zeros(numbers), basis, zeros(codec.channels), patch=codec.patch)


class FullSize(AbstractRun):
  """The run, with the small worlds' own codecs and encoders."""

  @functools.cached_property
  def text_encoder(self) -> ZeroTexts | WordTable:
    e = self.experiment
    if is_wan(e):
      return ZeroTexts(e.text)
    return WordTable(shapes_world.VOCABULARY, e.text.length, e.text.dim)

  @functools.cached_property
  def autoencoder(self) -> WanAutoencoder | PatchPCA:
    codec = self.experiment.codec
    return WanShapes(codec) if is_wan(self.experiment) else unfitted(codec)

  def pixels(self, size: int, frames: int) -> jax.ShapeDtypeStruct:
    data = self.experiment.data
    return shape((size, frames, data.height, data.width, 3), np.uint8)

  @property
  def long_frames(self) -> int:
    """Latent frames of the sample stage's videos."""
    return self.experiment.codec.latent_frames(samples.long_frames(self))
