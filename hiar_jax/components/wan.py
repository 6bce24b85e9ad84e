"""The components of Wan2.1 (arXiv 2503.20314): UMT5-XXL (arXiv 2304.09151) and the 3D VAE, or the
tiny autoencoder TAEHV in its place, from converted weights.

    prompt --TextCache (tokenizer, UMT5, disk)--> text [b l d] --embed--> float32 [b l d]
    latents [b f h w c] --ChunkedDecoder (VAE or TAEHV)--> pieces uint8 [b F_i H W 3]
    uint8 [b F H W 3] --encode of the VAE or TAEHV--> latents [b f h w c]

with F = 1 + 4 (f - 1), H = 8 h, W = 8 w. The tokens of a prompt are its text: UMT5 is too large to
run in the training loop.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.checkpoints import weights
from hiar_jax.components import chunked_decoder, patch_pca, umt5_tokenizer
from hiar_jax.components.umt5_encoder import TextCache
from hiar_jax.data import prompt_texts
from hiar_jax.errors import UserError, at_least
from hiar_jax.models import taehv, vae, vae_tiling
from hiar_jax.types import LatentShape, Text, Video

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class WanCodecConfig:
  """Wan2.1's autoencoder.

  weights: a directory made by hiar_jax.convert. tiny: TAEHV instead. tile: latents a side of the
  tiles for small memories, 0 for whole frames. dtype: of activations.
  """

  kind: str = "wan"
  weights: str = ""
  tiny: bool = False
  tile: int = 0
  dtype: str = "float32"
  channels: int = 16
  spatial_factor: int = 8
  temporal_factor: int = 4

  def __post_init__(self):
    _check_dtype(self.dtype, "codec.dtype")


@dataclasses.dataclass(frozen=True)
class UMT5TextConfig:
  """UMT5 and its tokenizer.

  weights: a directory made by hiar_jax.convert. cache: directory of encoded texts, by default
  <weights>/texts. length: tokens of a prompt; dim: width of the text.
  """

  kind: str = "umt5"
  weights: str = ""
  cache: str = ""
  dtype: str = "bfloat16"
  length: int = 512
  dim: int = 4096

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)
    _check_dtype(self.dtype, "text.dtype")


def _check_dtype(dtype: str, name: str) -> None:
  if dtype not in DTYPES:
    raise UserError(f"{name} = {dtype!r}: expected one of {', '.join(DTYPES)}")


@dataclasses.dataclass(frozen=True)
class WanComponents:
  """`Components` of Wan2.1; weights are read when first used (training needs no VAE)."""

  codec: WanCodecConfig
  text: UMT5TextConfig
  latent: LatentShape

  # ---------------------------------------------------------------------- prompt -> tokens -> text

  @functools.cached_property
  def texts(self) -> TextCache:
    """The tokenizer and UMT5 behind a cache on disk."""
    config = self.text
    directory = config.cache or str(pathlib.Path(config.weights) / "texts")
    return TextCache(config.weights, directory, dtype=config.dtype, length=config.length)

  def prepare(self, prompts: Sequence[str]) -> None:
    self.texts.fill([*prompts, umt5_tokenizer.NEGATIVE_PROMPT])

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return self.texts(prompts)

  def embed(self, tokens) -> Text:
    return _float32(tokens)

  def negative(self) -> Text:
    return _float32(self.texts([umt5_tokenizer.NEGATIVE_PROMPT]))

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    if "text" in record:  # [l d], stored without its padding
      return prompt_texts.pad([record["text"]], self.text.length)[0]
    return self.texts([record["caption"].decode()])[0]

  def warnings(self, prompt: str) -> list[str]:
    return []  # UMT5 has no unknown words; the text cache reports what it cuts off

  # ---------------------------------------------------------------------------- latents <-> pixels

  @functools.cached_property
  def _autoencoder(self) -> tuple[Any, Any, Any]:
    """(module, config, params): module is models.vae or models.taehv, which share an interface."""
    codec = self.codec
    kind, module = ("tiny_vae", taehv) if codec.tiny else ("vae", vae)
    config, params = weights.load(codec.weights, kind)
    return module, dataclasses.replace(config, dtype=getattr(jnp, codec.dtype)), params

  @functools.cached_property
  def stream(self) -> chunked_decoder.ChunkedDecoder:
    """The decoder on one device."""
    _, config, params = self._autoencoder
    if self.codec.tiny:
      return chunked_decoder.from_taehv(params, config)
    return chunked_decoder.from_vae(params, config, tiling=tiling_of(self.codec))

  @functools.cached_property
  def _wide_stream(self) -> chunked_decoder.ChunkedDecoder:
    """The decoder with the width of a frame sharded over this host's devices."""
    devices = tuple(jax.local_devices())
    # tiles exist to save memory and are decoded one after another: one device
    return dataclasses.replace(
      self.stream, devices=devices[:1] if tiling_of(self.codec) else devices
    )

  def encode(self, video) -> Video:
    # only the teacher's own training encodes videos, and Wan's teacher is published
    raise UserError(
      "the teacher of this experiment is published, not trained: give weights.base, a directory "
      "of converted weights"
    )

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # through the host: the network's mesh shards the latents in another way
    yield from self._wide_stream(np.asarray(latents))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(
      self._wide_stream.spread(self._encode, video, factor=self.codec.spatial_factor)
    )

  @functools.cached_property
  def _encode(self):
    # cached: one jitted function, so videos of one size compile once
    module, config, _ = self._autoencoder
    tiling = tiling_of(self.codec)
    encode = functools.partial(vae_tiling.encode, tiling=tiling) if tiling else module.encode
    return jax.jit(lambda params, video: encode(params, patch_pca.to_unit(video), config=config))


@jax.jit
def _float32(text) -> jax.Array:
  return text.astype(jnp.float32)


def tiling_of(codec: WanCodecConfig) -> vae_tiling.Tiling | None:
  """The tiling of the VAE, neighbours overlapping by 25 %; None for whole frames."""
  return vae_tiling.Tiling(codec.tile, codec.tile // 4) if codec.tile and not codec.tiny else None
