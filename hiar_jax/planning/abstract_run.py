"""A run of an experiment at its own size, of shapes alone: no weights, no files."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.packing.codebook import Codebook
from hiar_jax.training.run import Run

shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class ZeroTexts:
  """Zeros for the texts of prompts, without an encoder. config: the group `text`."""

  config: Any
  negative_prompt = ""

  def tokens(self, prompts) -> np.ndarray:
    c = self.config
    return np.zeros((len(prompts), c.length, c.dim), jnp.dtype(getattr(c, "dtype", "float32")))

  def embed(self, tokens) -> jax.Array:
    return tokens.astype(jnp.float32)


class AbstractRun(Run):
  """The run, and the shapes of what its programs take."""

  @functools.cached_property
  def text_encoder(self) -> Any:
    return ZeroTexts(self.experiment.text)

  @functools.cached_property
  def codebook(self) -> Codebook | None:
    config, channels = self.experiment.framepack, self.experiment.codec.channels
    if config is None or not config.parsed.discretised:
      return None
    numbers = config.codebook.centroids, config.codebook.unit**2 * channels
    return Codebook(np.zeros(numbers, np.float32), config.codebook.unit)

  def texts(self, prompts) -> np.ndarray:
    # in NumPy: a program may be made under a mesh of devices that are not there
    encoder = self.text_encoder
    if isinstance(encoder, ZeroTexts):
      return encoder.tokens(prompts).astype(np.float32)
    return super().texts(prompts)

  def batch(self, size: int, *keys: str) -> dict:
    """Returns a batch as a step takes it: text, example_id, start where it is read, and these keys:
    video or latents (as latents), trajectory.
    """
    e = self.experiment
    found = {"text": self.prompts(size), "example_id": integers(size)}
    if e.dit.place_embedding:
      found["start"] = integers(size)
    if {"video", "latents"} & set(keys):
      found["latents"] = self.latents(size, e.latent.frames)
    if "trajectory" in keys:
      points = len(self.point_sigmas)
      found["trajectory"] = shape((size, points, *e.latent.clip), np.float32)
    return found

  def prompts(self, size: int) -> jax.ShapeDtypeStruct:
    """Returns texts, as the network reads them."""
    text = self.experiment.text
    return shape((size, text.length, text.dim), np.float32)

  @property
  def negative(self) -> jax.ShapeDtypeStruct:
    """The text of the negative prompt."""
    return self.prompts(1)

  def latents(self, size: int, frames: int) -> jax.ShapeDtypeStruct:
    return shape((size, *self.experiment.latent.block(frames)), np.float32)


def integers(*sizes: int) -> jax.ShapeDtypeStruct:
  return shape(sizes, np.int32)
