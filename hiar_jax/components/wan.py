"""The components of Wan2.1: its autoencoder (or the tiny one) and UMT5, from converted weights.

Texts come from a cache on disk, encoded when they are new.
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
from hiar_jax.components.interfaces import Task
from hiar_jax.components.text_cache import TextCache
from hiar_jax.data import prompt_texts
from hiar_jax.errors import UserError, at_least
from hiar_jax.models import taehv, vae, vae_tiling
from hiar_jax.types import LatentShape

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class WanCodecConfig:
  """Wan2.1's autoencoder from `weights`, a directory made by hiar_jax.convert; `tiny`: TAEHV
  instead.

  tile: latents a side of the tiles that small memories encode and decode in, 0 = whole frames.
  dtype: of activations.
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
  """UMT5 and its tokenizer from `weights`; texts are kept in `cache` (default: <weights>/texts).

  length: tokens, dim: of a token's text.
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
  """Wan2.1's VAE and UMT5.

  Each is read when it is first needed: training from trajectories never needs the VAE.
  """

  codec: WanCodecConfig
  text: UMT5TextConfig
  latent: LatentShape

  @functools.cached_property
  def texts(self) -> TextCache:
    c = self.text
    return TextCache(
      c.weights, c.cache or str(pathlib.Path(c.weights) / "texts"), dtype=c.dtype, length=c.length
    )

  @functools.cached_property
  def task(self) -> Task:
    return Task(
      encode=self._no_videos,
      embed=_float32,
      negative=self._negative,
      latent=self.latent,
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
      return prompt_texts.pad([record["text"]], self.text.length)[0]
    return self.texts([record["caption"].decode()])[0]

  def remarks(self, prompt: str) -> list[str]:
    return []  # the text cache says what it cuts off

  @functools.cached_property
  def _autoencoder(self) -> tuple[Any, Any, Any]:
    """(module, config, params)."""
    codec = self.codec
    kind, module = ("tiny_vae", taehv) if codec.tiny else ("vae", vae)
    config, params = weights.load(codec.weights, kind)
    return module, dataclasses.replace(config, dtype=getattr(jnp, codec.dtype)), params

  @functools.cached_property
  def stream(self) -> chunked_decoder.ChunkedDecoder:
    """The decoder, to be run piece by piece."""
    _, config, params = self._autoencoder
    if self.codec.tiny:
      return chunked_decoder.from_taehv(params, config)
    return chunked_decoder.from_vae(params, config, tiling=tiling_of(self.codec))

  @functools.cached_property
  def _wide_stream(self) -> chunked_decoder.ChunkedDecoder:
    """The decoder over all devices; tiles are decoded one after another on one."""
    devices = tuple(jax.local_devices())
    return dataclasses.replace(
      self.stream, devices=devices[:1] if tiling_of(self.codec) else devices
    )

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # they may lie on the network's devices, spread otherwise
    yield from self._wide_stream(np.asarray(latents))

  @functools.cached_property
  def _encode(self):
    """Compiled once for all videos of a size."""
    module, config, _ = self._autoencoder
    tiling = tiling_of(self.codec)
    encode = functools.partial(vae_tiling.encode, tiling=tiling) if tiling else module.encode
    return jax.jit(lambda params, video: encode(params, patch_pca.to_unit(video), config=config))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(
      self._wide_stream.spread(self._encode, video, factor=self.codec.spatial_factor)
    )


def _float32(text) -> jax.Array:
  return jnp.asarray(text, jnp.float32)


def tiling_of(codec: WanCodecConfig) -> vae_tiling.Tiling | None:
  """The tiles of a small memory; None: whole frames."""
  return vae_tiling.Tiling(codec.tile, codec.tile // 4) if codec.tile and not codec.tiny else None
