"""A codec, a text encoder and a context level of one's own, as a fork would write them.

The codec is not linear and takes two frames a latent frame; the text encoder reads letters.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.components.interfaces import AutoencoderConfig, TextEncoderConfig
from hiar_jax.files import write_atomic

# --------------------------------------------------------------------------------------- the codec

SQUASH = "squash.json"  # in the data's directory


@dataclasses.dataclass(frozen=True)
class SquashConfig(AutoencoderConfig):
  """Mean colours of patches of two frames, squashed by asinh."""

  kind: str = "squash"
  patch: int = 4
  fitted = True
  channels = 6
  temporal_factor = 2

  @property
  def spatial_factor(self):
    return self.patch

  def fit(self, directory, clips):
    if not (directory / SQUASH).exists():
      gains = np.std(clips() / 127.5 - 1.0, axis=(0, 1, 2, 3))
      write_atomic(directory / SQUASH, json.dumps(list(map(float, gains))).encode())

  def open(self, directory):
    gains = json.loads((pathlib.Path(directory) / SQUASH).read_text())
    return Squash(np.tile(np.asarray(gains, np.float32), 2), self.patch)


@dataclasses.dataclass(frozen=True, eq=False)
class Squash:
  """gain: [6], of both frames' colours."""

  gain: np.ndarray
  patch: int
  identity = ""

  @functools.cached_property
  def encode(self):
    return jax.jit(functools.partial(squash, patch=self.patch, gain=self.gain))

  def latents(self, video):
    return np.asarray(self.encode(video))

  def pieces(self, latents) -> Iterator[np.ndarray]:
    latents = np.asarray(latents)
    yield self.frames(latents[:, :1])[:, 1:]  # a video's first latent frame has one frame
    for i in range(1, latents.shape[1]):
      yield self.frames(latents[:, i : i + 1])

  def frames(self, latents):
    """[b f h w 6] -> uint8 [b 2f H W 3]"""
    b, f, h, w, _ = latents.shape
    colours = np.sinh(latents) * self.gain
    frames = (
      colours.reshape(b, f, h, w, 2, 3).transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, 3)
    )
    frames = frames.repeat(self.patch, axis=2).repeat(self.patch, axis=3)
    return np.clip(np.rint((frames + 1) * 127.5), 0, 255).astype(np.uint8)

  def block_decoder(self, device=None):
    return SquashBlocks(self)


@dataclasses.dataclass(frozen=True)
class SquashBlocks:
  """memory: latent frames so far."""

  codec: Squash

  def __call__(self, latents, memory):
    frames = self.codec.frames(np.asarray(latents))[0]
    before = np.int32(0) if memory is None else memory
    return frames[0 if before else 1 :], before + np.int32(latents.shape[1])

  def remember(self, leaves, latents):
    return leaves[0] if leaves else None


def squash(video, patch, gain):
  x = jnp.asarray(video).astype(jnp.float32) / 127.5 - 1.0
  x = jnp.concatenate([x[:, :1], x], axis=1)
  b, f, h, w, _ = x.shape
  x = x.reshape(b, f // 2, 2, h // patch, patch, w // patch, patch, 3).mean((4, 6))
  x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, f // 2, h // patch, w // patch, 6)
  return jnp.arcsinh(x / gain.reshape(1, 1, 1, 1, -1))


# --------------------------------------------------------------------------------- the text encoder

LETTERS = "letters.json"


@dataclasses.dataclass(frozen=True)
class LettersConfig(TextEncoderConfig):
  """length: letters of a prompt that are read."""

  kind: str = "letters"
  length: int = 32
  dim: int = 8

  def fit(self, directory, words):
    if not (directory / LETTERS).exists():
      letters = sorted({letter for word in words for letter in word})
      write_atomic(directory / LETTERS, json.dumps(letters).encode())

  def open(self, directory, words=tuple):
    letters = json.loads((pathlib.Path(directory) / LETTERS).read_text())
    return Letters(" " + "".join(letters), self.length, self.dim)


@dataclasses.dataclass(frozen=True)
class Letters:
  """ids: 0 is padding, 1 an unknown letter."""

  known: str
  length: int
  dim: int
  identity = ""
  negative_prompt = "blur"

  def prepare(self, prompts: Sequence[str]) -> None:
    pass

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    found = np.zeros((len(prompts), self.length), np.int32)
    for row, prompt in zip(found, prompts, strict=True):
      ids = self.rows(prompt)
      row[: len(ids)] = ids
    return found

  @functools.cached_property
  def embed(self):
    table = np.random.default_rng(5).standard_normal((len(self.known) + 2, self.dim))
    waves = np.cos(np.arange(self.length)[:, None] / (1 + np.arange(self.dim)[None]))

    def embed(tokens):
      rows = jnp.asarray(table, jnp.float32)[tokens] * jnp.asarray(waves, jnp.float32)[None]
      return jnp.where(tokens[..., None] > 0, rows, 0.0)

    return jax.jit(embed)

  def rows(self, prompt: str) -> np.ndarray:
    # find: -1 for an unknown letter
    return np.asarray([self.known.find(x) + 2 for x in prompt.lower()[: self.length]], np.int32)

  def warnings(self, prompt: str) -> list[str]:
    unknown = sorted(set(prompt.lower()) - set(self.known))
    return [f"unknown letters: {''.join(unknown)}"] if unknown else []


# -------------------------------------------------------------------------------- the context level


@dataclasses.dataclass(frozen=True)
class Half:
  """The clean prediction with noise of half the level that the step goes to."""

  free = False
  of_x0 = True

  def sigma(self, sigma, sigma_next):
    return 0.5 * sigma_next

  def latent(self, x, x_next, x0, noised):
    return noised(x0)
