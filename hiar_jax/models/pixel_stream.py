"""Latents of any length -> uint8 pixels, a few frames at a time: memory that does not grow with the video, on the device or off it."""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import at_least
from hiar_jax.models import tiny_vae, vae, vae_tiling
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.types import Params, PyTree

DecodeChunk = Callable[[Params, jax.Array, PyTree], tuple[jax.Array, PyTree]]  # (params, latents, cache) -> (pixels in [-1, 1], cache)


@dataclasses.dataclass(frozen=True)
class PixelStream:
  """A decoder that is compiled once and run piece by piece. chunk: latent frames a piece (4 frames of pixels each)."""

  decode: DecodeChunk
  params: Params
  chunk: int = 1

  def __post_init__(self):
    at_least(1, chunk=self.chunk)

  @functools.cached_property
  def _step(self):
    def step(params, latents, cache):
      pixels, cache = self.decode(params, latents, cache)
      return to_uint8(pixels), cache

    return jax.jit(step, donate_argnums=2)

  def __call__(self, latents: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Latents [b f h w c] -> pieces uint8 [b F_i H W 3] whose joint is the decoded video; cut anywhere, the numbers are the same."""
    for pixels, _ in self.resume(latents, None):
      yield pixels

  def resume(self, latents: jax.Array | np.ndarray, cache: PyTree) -> Iterator[tuple[np.ndarray, PyTree]]:
    """The same after what `cache` has seen (None: a video's start), with the cache after each piece; the one that goes in is used up."""
    start = 0
    while start < latents.shape[1]:
      end = start + (1 if cache is None else self.chunk)  # a video's first latent frame is one frame of pixels
      pixels, cache = self._step(self.params, latents[:, start:end], cache)
      yield np.asarray(pixels), cache
      start = end


def of_vae(params: Params, config: vae.VAEConfig, chunk: int = 1, tiling: Tiling | None = None) -> PixelStream:
  """Wan2.1's VAE; with a tiling in tiles, for small memories."""
  if tiling is None:
    return PixelStream(lambda params, latents, cache: vae.decode_chunk(params, latents, cache, config), params, chunk)
  return PixelStream(lambda params, latents, cache: vae_tiling.decode_chunk(params, latents, cache, config, tiling), params, chunk)


def of_tiny_vae(params: Params, config: tiny_vae.TinyVAEConfig, chunk: int = 1) -> PixelStream:
  """The tiny autoencoder."""
  return PixelStream(lambda params, latents, cache: tiny_vae.decode_chunk(params, latents, cache, config), params, chunk)


def to_uint8(pixels: jax.Array) -> jax.Array:
  """[-1, 1] -> 0 .. 255, rounded and clipped; on the device, so that a quarter of the bytes leave it."""
  return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
