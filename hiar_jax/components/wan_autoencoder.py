"""The autoencoder of Wan2.1 (arXiv 2503.20314), or the tiny one TAEHV in its place, from converted
weights.

    latents [b f h w c] --ChunkedDecoder (VAE or TAEHV)--> pieces uint8 [b F_i H W 3]
    uint8 [b F H W 3] --encode of the VAE or TAEHV--> latents [b f h w c]

with F = 1 + 4 (f - 1), H = 8 h, W = 8 w.
"""

from collections.abc import Iterator
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.checkpoints import weights
from hiar_jax.components import patch_pca
from hiar_jax.components.block_decoder import CausalDecoder
from hiar_jax.components.chunked_decoder import ChunkedDecoder
from hiar_jax.components.interfaces import AutoencoderConfig, NetworkSizes
from hiar_jax.config.building import path_field
from hiar_jax.errors import UserError, at_least, one_of
from hiar_jax.models import taehv, vae, vae_tiling
from hiar_jax.progress import is_writer
from hiar_jax.types import DTYPES, Video

LEAST_TILE = 4  # latents a side; 25 % of it, the overlap of neighbours, is then 1
SEAMLESS_TILE = 16  # below it neighbours overlap by less than 32 pixels, and seams are seen


@dataclasses.dataclass(frozen=True)
class WanCodecConfig(AutoencoderConfig):
  """Wan2.1's autoencoder.

  weights: a directory made by hiar_jax.convert. tiny: TAEHV instead. tile: latents a side of the
  tiles for small memories, 0 for whole frames. dtype: of activations.
  """

  kind: str = "wan"
  weights: str = path_field()
  tiny: bool = False
  tile: int = 0
  dtype: str = "float32"
  channels: int = 16
  spatial_factor: int = 8
  temporal_factor: int = 4
  fitted = False

  def __post_init__(self):
    one_of(DTYPES, **{"codec.dtype": self.dtype})
    if self.tile:
      at_least(LEAST_TILE, **{"codec.tile": self.tile})

  @property
  def label(self) -> str:
    """The folder of the autoencoder in a directory of converted weights."""
    return "tiny_vae" if self.tiny else "vae"

  @property
  def tiling(self) -> vae_tiling.Tiling | None:
    """The tiling of the VAE, neighbours overlapping by 25 %; None for whole frames."""
    return vae_tiling.Tiling(self.tile, self.tile // 4) if self.tile and not self.tiny else None

  def open(self, directory) -> "WanAutoencoder":
    if self.tiling and self.tile < SEAMLESS_TILE and is_writer():
      print(
        f"note: tiles of {self.tile} latents a side ({8 * self.tile} pixels) may show seams; "
        f"{SEAMLESS_TILE} and more do not",
        file=sys.stderr,
      )
    return WanAutoencoder(self)

  @property
  def published(self) -> tuple[str, str]:
    return self.weights, self.label

  def with_weights(self, directory: str) -> "WanCodecConfig":
    found = directory and weights.exists(directory, self.label)
    return dataclasses.replace(self, weights=directory) if found else self

  def with_options(self, decoder: str | None, tile: int | None) -> "WanCodecConfig":
    tiny = decoder == "tiny_vae" if decoder else self.tiny
    tile = self.tile if tile is None else tile
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
    return dataclasses.replace(self, tiny=tiny, tile=tile)

  def networks(self) -> NetworkSizes:
    return {"tiny VAE" if self.tiny else "VAE": (self.abstract_decoder().params, "float32")}

  def abstract_decoder(self) -> ChunkedDecoder:
    module, published = (taehv, taehv.TinyVAEConfig()) if self.tiny else (vae, vae.VAEConfig())
    config = weights.read_config(self.weights, self.label, published)
    config = dataclasses.replace(config, dtype=getattr(jnp, self.dtype))
    return self.decoder(config, module.abstract_params(config))

  def decoder(self, config, params) -> ChunkedDecoder:
    """Returns the decoder of a network of this kind with its weights, on one device."""
    if self.tiling:
      decode = functools.partial(vae_tiling.decode_chunk, config=config, tiling=self.tiling)
    else:
      decode = functools.partial((taehv if self.tiny else vae).decode_chunk, config=config)
    return ChunkedDecoder(decode, params, splits=self.tiling is None)


@dataclasses.dataclass(frozen=True)
class WanAutoencoder:
  """An `Autoencoder`; weights are read when first used (training on prompts needs no VAE)."""

  config: WanCodecConfig

  @property
  def identity(self) -> str:
    return weights.describe(self.config.weights, self.config.label).fingerprint

  @functools.cached_property
  def network(self) -> tuple[Any, Any, Any]:
    """(module, config, params): module is models.vae or models.taehv, which share an interface."""
    config, params = weights.load(self.config.weights, self.config.label)
    # else every video would be black
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params)):
      raise UserError(
        f"{self.config.weights}: the weights of {self.config.label} are not finite; convert them "
        "again from whole files"
      )
    config = dataclasses.replace(config, dtype=getattr(jnp, self.config.dtype))
    return taehv if self.config.tiny else vae, config, params

  @functools.cached_property
  def stream(self) -> ChunkedDecoder:
    """The decoder on one device."""
    return self.config.decoder(*self.network[1:])

  @functools.cached_property
  def _wide_stream(self) -> ChunkedDecoder:
    """The decoder with the width of a frame sharded over this host's devices."""
    return dataclasses.replace(self.stream, devices=tuple(jax.local_devices()))

  def encode(self, video) -> Video:
    raise UserError(
      "Wan's autoencoder is too slow for the training loop: the data stage stores its latents"
    )

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # through the host: the network's mesh shards the latents in another way
    yield from self._wide_stream(np.asarray(latents))

  def latents(self, video: np.ndarray) -> np.ndarray:
    factor = self.config.spatial_factor
    return np.asarray(self._wide_stream.spread(self._encode, video, factor=factor))

  @functools.cached_property
  def _encode(self):
    # cached: one jitted function, so videos of one size compile once
    module, config, _ = self.network
    tiling = self.config.tiling
    encode = functools.partial(vae_tiling.encode, tiling=tiling) if tiling else module.encode
    return jax.jit(lambda params, video: encode(params, patch_pca.to_unit(video), config=config))

  def block_decoder(self, device: jax.Device | None = None) -> CausalDecoder:
    return CausalDecoder(self.stream, device)
