"""Decoders of a stream (`interfaces.BlockDecoder`), block by block: the memory of earlier blocks is
a value that goes in and comes out.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import numpy as np

from hiar_jax.components.chunked_decoder import ChunkedDecoder
from hiar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class FramewiseDecoder:
  """A decoder that takes each latent frame by itself and needs no memory."""

  pieces: Callable  # latents [1 f h w c] -> pieces uint8 [1 F_i H W 3], as Autoencoder.pieces

  def __call__(self, latents, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    # Through the host: latents on the pipeline's mesh would be decoded on all of its devices, in
    # competition with the next tick.
    latents = np.asarray(latents)
    return np.concatenate([piece[0] for piece in self.pieces(latents)]), None

  def remember(self, leaves, latents) -> PyTree:
    return None


@dataclasses.dataclass(frozen=True)
class CausalDecoder:
  """A causal autoencoder on `device`; None: where its weights are."""

  stream: ChunkedDecoder
  device: jax.Device | None = None

  @functools.cached_property
  def _placed(self) -> ChunkedDecoder:
    """The decoder with its weights on `device`; moved once, at the first block."""
    if self.device is None:
      return self.stream
    params = jax.device_put(self.stream.params, self.device)
    return dataclasses.replace(self.stream, params=params)

  def __call__(self, latents, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    # through the host: from the pipeline's mesh to a device that need not belong to it
    latents = jax.device_put(np.asarray(latents), self.device)
    pieces = list(self._placed.resume(latents, memory))
    return np.concatenate([pixels[0] for pixels, _ in pieces]), pieces[-1][1]

  def remember(self, leaves, latents) -> PyTree:
    if not leaves:
      return None
    # A snapshot holds leaves alone; the tree's structure is that of the cache after one frame.
    frame = jax.ShapeDtypeStruct((1, 1, *latents[2:]), np.float32)
    _, memory = jax.eval_shape(self.stream.decode, self.stream.params, frame, None)
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(memory), leaves), self.device)
