"""What stands between people and the model: prompts become what it reads, its latents become
pictures, and back.

Two media with one interface. `SmallMedium`: a codec fitted on the data and a frozen word table, for
the small worlds. `WanMedium`: Wan2.1's autoencoder (or the tiny one) and UMT5, from a directory of
converted weights; texts come from a cache on disk, encoded when they are new.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import io
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.checkpoints import weights
from hiar_jax.components import chunked_decoder, patch_pca, umt5_tokenizer, word_table
from hiar_jax.components.patch_pca import PatchCodec
from hiar_jax.components.text_cache import TextCache
from hiar_jax.data import prompt_texts
from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic
from hiar_jax.models import taehv, vae, vae_tiling
from hiar_jax.rollout.noise import Task
from hiar_jax.training.experiment import Experiment, WanCodecConfig


class Medium(Protocol):
  """task: what the steps know of it.

  A prompt's tokens are what `task.embed` takes: word ids, or the text itself.
  """

  task: Task

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes what needs an encoder of its own, all at once, before a loop asks for one prompt
    after another.
    """

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """[n l] ids or [n l d] texts."""

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    """The tokens of one record of a data set: of its text where it brings one, else of its
    caption.
    """

  def remarks(self, prompt: str) -> list[str]:
    """What the model will not understand of it, a line each."""

  def pieces(self, latents) -> Iterator[np.ndarray]:
    """Latents [b f h w c] -> pieces uint8 [b F_i H W 3], in order."""

  def latents(self, video: np.ndarray) -> np.ndarray:
    """uint8 [b F H W 3] -> [b f h w c]."""


def pixels(medium: Medium, latents) -> np.ndarray:
  """Latents [b f h w c] -> uint8 [b F H W 3]."""
  return np.concatenate(list(medium.pieces(latents)), axis=1)


# --------------------------------------------------------------------------------- the small worlds


@dataclasses.dataclass(frozen=True)
class SmallMedium:
  """A fitted codec, a frozen word table over `vocabulary`."""

  experiment: Experiment
  codec_file: pathlib.Path
  vocabulary: tuple[str, ...]

  @functools.cached_property
  def tokenizer(self) -> word_table.WordTokenizer:
    return word_table.WordTokenizer(self.vocabulary, self.experiment.text.length)

  @functools.cached_property
  def codec(self) -> PatchCodec:
    return load_codec(self.codec_file)

  @functools.cached_property
  def task(self) -> Task:
    """Closes over the fitted codec and the frozen word table."""
    e, codec = self.experiment, self.codec
    table = word_table.word_table(self.tokenizer.size, e.text.length, e.text.dim)
    embed = lambda tokens: word_table.encode(table, tokens)
    return Task(
      encode=lambda batch: patch_pca.encode(codec, patch_pca.to_unit(batch["video"])),
      embed=embed,
      negative=lambda text: embed(jnp.zeros(text.shape[:2], jnp.int32)),  # the empty prompt
      **e.latent_sizes,
    )

  def prepare(self, prompts: Sequence[str]) -> None:
    pass  # a table lookup

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return np.stack([self.tokenizer(prompt) for prompt in prompts])

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    return self.tokenizer(record["caption"].decode())

  def remarks(self, prompt: str) -> list[str]:
    unknown, too_many = self.tokenizer.unknown(prompt), self.tokenizer.cut_off(prompt)
    lines = []
    if too_many:
      lines.append(
        f"prompt {prompt[:60]!r}...: the model reads {self.tokenizer.length} words; the last "
        f"{too_many} are left out"
      )
    if unknown:
      lines.append(
        f"prompt {prompt!r}: the model does not know {', '.join(map(repr, unknown))}; it is made "
        "without"
      )
    return lines

  def pieces(self, latents) -> Iterator[np.ndarray]:
    yield patch_pca.to_uint8(jax.jit(patch_pca.decode)(self.codec, latents))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(patch_pca.encode(self.codec, patch_pca.to_unit(video)))


def save_codec(path: pathlib.Path, codec: PatchCodec) -> None:
  """Atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, mean=codec.mean, basis=codec.basis, scale=codec.scale, patch=codec.patch)
  write_atomic(path, buffer.getvalue())


def load_codec(path: pathlib.Path) -> PatchCodec:
  if not path.exists():
    raise UserError(f"{path} is missing: the data stage fits it; run the training command first")
  with np.load(path) as stored:
    arrays = {name: stored[name] for name in stored.files}
  return PatchCodec(arrays["mean"], arrays["basis"], arrays["scale"], patch=int(arrays["patch"]))


# ---------------------------------------------------------------------------------------------- Wan


@dataclasses.dataclass(frozen=True)
class WanMedium:
  """Wan2.1's VAE and UMT5.

  Each is read when it is first needed: training from trajectories never needs the VAE.
  """

  experiment: Experiment

  @functools.cached_property
  def texts(self) -> TextCache:
    c = self.experiment.text
    return TextCache(
      c.weights, c.cache or str(pathlib.Path(c.weights) / "texts"), dtype=c.dtype, length=c.length
    )

  @functools.cached_property
  def task(self) -> Task:
    return Task(
      encode=self._no_videos,
      embed=_float32,
      negative=self._negative,
      **self.experiment.latent_sizes,
    )

  def _negative(self, text: jax.Array) -> jax.Array:
    negative = _float32(self.texts([umt5_tokenizer.NEGATIVE_PROMPT]))
    return jnp.broadcast_to(negative, (text.shape[0], *negative.shape[1:]))

  def _no_videos(self, batch) -> jax.Array:
    raise UserError(
      "the teacher of this experiment is published, not trained: give weights.base, a directory "
      "of converted weights"
    )

  def prepare(self, prompts: Sequence[str]) -> None:
    self.texts.fill([*prompts, umt5_tokenizer.NEGATIVE_PROMPT])

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return self.texts(prompts)

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    if "text" in record:
      return prompt_texts.pad([record["text"]], self.experiment.text.length)[0]
    return self.texts([record["caption"].decode()])[0]

  def remarks(self, prompt: str) -> list[str]:
    return []  # the text cache says what it cuts off

  @functools.cached_property
  def _autoencoder(self) -> tuple[Any, Any, Any]:
    """(module, config, params)."""
    codec = self.experiment.codec
    kind, module = ("tiny_vae", taehv) if codec.tiny else ("vae", vae)
    config, params = weights.load(codec.weights, kind)
    return module, dataclasses.replace(config, dtype=getattr(jnp, codec.dtype)), params

  @functools.cached_property
  def stream(self) -> chunked_decoder.PixelStream:
    """The decoder, to be run piece by piece."""
    _, config, params = self._autoencoder
    if self.experiment.codec.tiny:
      return chunked_decoder.of_tiny_vae(params, config)
    return chunked_decoder.of_vae(params, config, tiling=tiling_of(self.experiment.codec))

  @functools.cached_property
  def _wide_stream(self) -> chunked_decoder.PixelStream:
    """The decoder over all devices; tiles are decoded one after another on one."""
    devices = tuple(jax.local_devices())
    return dataclasses.replace(
      self.stream, devices=devices[:1] if tiling_of(self.experiment.codec) else devices
    )

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # they may lie on the network's devices, spread otherwise
    yield from self._wide_stream(np.asarray(latents))

  @functools.cached_property
  def _encode(self):
    """Compiled once for all videos of a size."""
    module, config, _ = self._autoencoder
    tiling = tiling_of(self.experiment.codec)
    encode = functools.partial(vae_tiling.encode, tiling=tiling) if tiling else module.encode
    return jax.jit(lambda params, video: encode(params, patch_pca.to_unit(video), config=config))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(
      self._wide_stream.spread(self._encode, video, factor=self.experiment.codec.spatial_factor)
    )


def _float32(text) -> jax.Array:
  return jnp.asarray(text, jnp.float32)


def tiling_of(codec: WanCodecConfig) -> vae_tiling.Tiling | None:
  """The tiles of a small memory; None: whole frames."""
  return vae_tiling.Tiling(codec.tile, codec.tile // 4) if codec.tile and not codec.tiny else None
