"""Latents of any length -> uint8 pixels, a few frames at a time: memory that does not grow with the
video, on the device or off it.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
import numpy as np

from hiar_jax.errors import at_least
from hiar_jax.models import taehv, vae, vae_tiling
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.types import Params, PyTree

# (params, latents, cache) -> (pixels in [-1, 1], cache)
DecodeChunk = Callable[[Params, jax.Array, PyTree], tuple[jax.Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class ChunkedDecoder:
  """A decoder that is compiled once and run piece by piece. chunk: latent frames a piece (4 frames
  of pixels each).

  devices: a frame's width is cut over as many of them as divide it, and the compiler exchanges the
  seams: only the attention in the VAE's middle, at the size of the latents, is whole on each. The
  numbers are one device's, up to rounding. Empty: where `params` are.
  """

  decode: DecodeChunk
  params: Params
  chunk: int = 1
  devices: tuple[jax.Device, ...] = ()

  def __post_init__(self):
    at_least(1, chunk=self.chunk)

  @functools.cached_property
  def _step(self):
    def step(params, latents, cache):
      pixels, cache = self.decode(params, latents, cache)
      return to_uint8(pixels), cache

    return jax.jit(step, donate_argnums=2)

  def __call__(self, latents: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Latents [b f h w c] -> pieces uint8 [b F_i H W 3] whose joint is the decoded video; cut
    anywhere, the numbers are the same.
    """
    for pixels, _ in self.resume(latents, None):
      yield pixels

  def resume(
    self, latents: jax.Array | np.ndarray, cache: PyTree
  ) -> Iterator[tuple[np.ndarray, PyTree]]:
    """The same after what `cache` has seen (None: a video's start), with the cache after each
    piece; the one that goes in is used up.
    """
    start = 0
    while start < latents.shape[1]:
      # a video's first latent frame is one frame of pixels
      end = start + (1 if cache is None else self.chunk)
      pixels, cache = self.spread(self._step, latents[:, start:end], cache)
      yield np.asarray(pixels), cache
      start = end

  def spread(
    self, code: Callable, video: jax.Array | np.ndarray, *others: PyTree, factor: int = 1
  ) -> Any:
    """code(params, video, *others) with a video [b f h w c] over the devices, whatever mesh is set
    here. factor: its pixels a latent.
    """
    where = self.place(video.shape[3] // factor)
    if where is None:
      return code(self.params, video, *others)
    with jax.set_mesh(where.mesh):
      return code(self._everywhere(where.mesh), jax.device_put(video, where), *others)

  def place(self, width: int) -> NamedSharding | None:
    """Where latents of this width go, and whatever else is cut as they are; None without
    `devices`.
    """
    count = max((n for n in range(1, len(self.devices) + 1) if width % n == 0), default=0)
    if not count:
      return None
    mesh = jax.make_mesh(
      (count,), ("width",), devices=self.devices[:count], axis_types=(AxisType.Auto,)
    )
    return NamedSharding(mesh, jax.P(None, None, None, "width"))

  def _everywhere(self, mesh: Mesh) -> Params:
    """The parameters, whole on every device."""
    if mesh not in self._copies:
      self._copies[mesh] = jax.device_put(self.params, NamedSharding(mesh, jax.P()))
    return self._copies[mesh]

  @functools.cached_property
  def _copies(self) -> dict[Mesh, Params]:
    return {}


def from_vae(
  params: Params, config: vae.VAEConfig, chunk: int = 1, tiling: Tiling | None = None
) -> ChunkedDecoder:
  """Wan2.1's VAE; with a tiling in tiles, one after another on one device, for small memories."""
  if tiling is None:
    return ChunkedDecoder(
      lambda params, latents, cache: vae.decode_chunk(params, latents, cache, config), params, chunk
    )
  return ChunkedDecoder(
    lambda params, latents, cache: vae_tiling.decode_chunk(params, latents, cache, config, tiling),
    params,
    chunk,
  )


def from_taehv(params: Params, config: taehv.TinyVAEConfig, chunk: int = 1) -> ChunkedDecoder:
  """The tiny autoencoder."""
  return ChunkedDecoder(
    lambda params, latents, cache: taehv.decode_chunk(params, latents, cache, config),
    params,
    chunk,
  )


def to_uint8(pixels: jax.Array) -> jax.Array:
  """[-1, 1] -> 0 .. 255, rounded and clipped; on the device, so that a quarter of the bytes leave
  it.
  """
  return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
