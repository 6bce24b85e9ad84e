"""A run of an experiment at its own size, of shapes alone: no weights, no files."""

import copy
import dataclasses
import functools
import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.components.patch_pca import PatchPCA
from hiar_jax.components.wan_autoencoder import WanAutoencoder, WanCodecConfig
from hiar_jax.components.word_table import WordTable
from hiar_jax.config.building import build
from hiar_jax.data import shapes_world
from hiar_jax.models import dit, taehv, vae
from hiar_jax.packing.codebook import Codebook
from hiar_jax.training import samples
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import Run

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
VARIANTS = {"shapes": ("main", "full", "smoke")}

shape = jax.ShapeDtypeStruct


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


@dataclasses.dataclass(frozen=True)
class ZeroTexts:
  """Zeros for the texts of prompts, without an encoder."""

  config: Any
  negative_prompt = ""

  def tokens(self, prompts) -> np.ndarray:
    c = self.config
    return np.zeros((len(prompts), c.length, c.dim), jnp.dtype(c.dtype))

  def embed(self, tokens) -> jax.Array:
    return tokens.astype(jnp.float32)


def unfitted(codec) -> PatchPCA:
  """The codec of a small world, fitted on nothing."""
  numbers, zeros = 3 * codec.patch**2, functools.partial(np.zeros, dtype=np.float32)
  basis = zeros((numbers, codec.channels))
  return PatchPCA(zeros(numbers), basis, zeros(codec.channels), patch=codec.patch)


class FullSize(Run):
  """The run, and the shapes of what its programs take."""

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

  @functools.cached_property
  def codebook(self) -> Codebook | None:
    config, channels = self.experiment.framepack, self.experiment.codec.channels
    if config is None or not config.parsed.discretised:
      return None
    numbers = config.codebook.centroids, config.codebook.unit**2 * channels
    return Codebook(np.zeros(numbers, np.float32), config.codebook.unit)

  def batch(self, size: int, *keys: str) -> dict:
    """A batch as a step takes it: text, example_id, start where it is read, and these keys."""
    e = self.experiment
    found = {"text": self.prompts(size), "example_id": integers(size)}
    if e.dit.place_embedding:
      found["start"] = integers(size)
    if "video" in keys:
      found["latents"] = self.latents(size, e.latent.frames)
    if "trajectory" in keys:
      points = len(self.point_sigmas)
      found["trajectory"] = shape((size, points, *e.latent.clip), np.float32)
    return found

  def prompts(self, size: int) -> jax.ShapeDtypeStruct:
    """Texts, as the network reads them."""
    text = self.experiment.text
    return shape((size, text.length, text.dim), np.float32)

  def latents(self, size: int, frames: int) -> jax.ShapeDtypeStruct:
    return shape((size, *self.experiment.latent.block(frames)), np.float32)

  def pixels(self, size: int, frames: int) -> jax.ShapeDtypeStruct:
    data = self.experiment.data
    return shape((size, frames, data.height, data.width, 3), np.uint8)

  @property
  def train_frames(self) -> int:
    """Latent frames of a clip."""
    return self.experiment.latent.frames

  @property
  def long_frames(self) -> int:
    """Latent frames of the sample stage's videos."""
    return self.experiment.codec.latent_frames(samples.long_frames(self))


def integers(*sizes: int) -> jax.ShapeDtypeStruct:
  return shape(sizes, np.int32)


@functools.cache
def network(config: dit.DiTConfig, dtype: str = "float32"):
  """Shapes of a DiT's weights."""
  shapes = jax.eval_shape(config.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: shape(leaf.shape, dtype), shapes)
