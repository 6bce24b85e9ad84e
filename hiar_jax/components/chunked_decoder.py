"""Latents of any length -> uint8 pixels, a few frames at a time.

    (pixels_i, cache_i) = decode(params, latents_i, cache_{i-1}),  cache_{-1} = None

Memory, on the device and on the host, does not grow with the video.
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
from hiar_jax.parallel.mesh import replicated
from hiar_jax.parallel.rules import leaf_sharding
from hiar_jax.types import Params, PyTree

# (params, latents, cache) -> (pixels in [-1, 1], cache)
DecodeChunk = Callable[[Params, jax.Array, PyTree], tuple[jax.Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class ChunkedDecoder:
  """A causal decoder, compiled once and run piece by piece.

  chunk: latent frames of a piece (4 pixel frames each).
  devices: the width of a frame is sharded over as many of them as divide it; the result is that of
  one device up to rounding. Empty: runs where `params` are. splits: False for tiles, which exist to
  save memory and are decoded one after another, on the first device.

  Raises UserError for a chunk below 1.
  """

  decode: DecodeChunk
  params: Params
  chunk: int = 1
  devices: tuple[jax.Device, ...] = ()
  splits: bool = True

  def __post_init__(self):
    at_least(1, chunk=self.chunk)

  @functools.cached_property
  def step(self) -> Callable:
    """step(params, latents, cache) -> (pixels uint8, cache), jitted."""

    def step(params, latents, cache):
      pixels, cache = self.decode(params, latents, cache)
      return to_uint8(pixels), cache

    # the cache is donated: the new one is written into the old one's buffers
    return jax.jit(step, donate_argnums=2)

  def __call__(self, latents: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """Decodes latents [b f h w c] from a video's start into pieces uint8 [b F_i H W 3].

    The pieces joined are the decoded video, whatever the chunk.
    """
    for pixels, _ in self.resume(latents, None):
      yield pixels

  def resume(
    self, latents: jax.Array | np.ndarray, cache: PyTree
  ) -> Iterator[tuple[np.ndarray, PyTree]]:
    """Decodes latents that follow those of `cache` (None: a video's start), piece by piece.

    Yields (pixels uint8 [b F_i H W 3], the cache after them). The cache passed in is donated.
    """
    start = 0
    while start < latents.shape[1]:
      # The first latent frame of a video makes 1 pixel frame, each later one 4: another shape, so
      # it is a piece of its own. With chunk = 1 the step compiles twice, whatever the length.
      end = start + (1 if cache is None else self.chunk)
      pixels, cache = self.spread(self.step, latents[:, start:end], cache)
      yield np.asarray(pixels), cache
      start = end

  def spread(
    self, function: Callable, video: jax.Array | np.ndarray, *others: PyTree, factor: int = 1
  ) -> Any:
    """Returns function(params, video, *others) with latents or pixels [b f h w c] sharded in width.

    factor: columns of the video per latent, 1 for latents.
    """
    sharding = self.place(video.shape[3] // factor)
    if sharding is None:
      return function(self.params, video, *others)
    # The caller's mesh (the network's) is replaced for the call. The compiler exchanges the seams
    # of the convolutions; only the VAE's middle attention gathers whole frames, at latent size.
    with jax.set_mesh(sharding.mesh):
      params = self._replicated(sharding.mesh)
      return function(params, jax.device_put(video, sharding), *others)

  def place(self, width: int) -> NamedSharding | None:
    """Sharding of [b f h w c] arrays whose latents have this width; None without `devices`."""
    most = len(self.devices) if self.splits else min(len(self.devices), 1)
    count = max((n for n in range(1, most + 1) if width % n == 0), default=0)
    if not count:
      return None
    mesh = jax.make_mesh(
      (count,), ("width",), devices=self.devices[:count], axis_types=(AxisType.Auto,)
    )
    return leaf_sharding("decoder/video", mesh)

  @functools.cached_property
  def _replicated(self) -> Callable[[Mesh], Params]:
    # one copy a mesh, not one a piece; widths that other device counts divide have other meshes
    return functools.cache(lambda mesh: jax.device_put(self.params, replicated(mesh)))


def to_uint8(pixels: jax.Array) -> jax.Array:
  """[-1, 1] -> uint8, rounded and clipped, of any shape; on the device."""
  # before the transfer to the host, which then moves 25 % of the bytes of float32
  return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
