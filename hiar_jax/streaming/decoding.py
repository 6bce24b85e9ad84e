"""Latents -> pixels, block after block, with what the decoder remembers of the blocks before as a
value that goes in and comes out.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np

from hiar_jax.components.chunked_decoder import ChunkedDecoder
from hiar_jax.components.interfaces import Components
from hiar_jax.components.wan import WanComponents
from hiar_jax.types import PyTree


class BlockDecoder(Protocol):
  def __call__(self, latents: jax.Array | np.ndarray, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    """(latents [1 f h w c], memory) -> (uint8 [F H W 3], memory).

    memory: None at a video's start; the one that goes in is used up.
    """

  def remember(self, leaves: list[np.ndarray], latents: tuple[int, ...]) -> PyTree:
    """The memory with these leaves (jax.tree.leaves of one), for latents of a shape [1 f h w c];
    None for none.
    """


@dataclasses.dataclass(frozen=True)
class FramewiseDecoder:
  """A codec that takes each latent frame for itself. pieces: Medium.pieces."""

  pieces: Callable

  def __call__(self, latents, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    # by way of the host: the devices of a pipe have other things to do
    latents = np.asarray(latents)
    return np.concatenate([piece[0] for piece in self.pieces(latents)]), None

  def remember(self, leaves, latents) -> PyTree:
    return None


@dataclasses.dataclass(frozen=True)
class CausalDecoder:
  """A causal autoencoder, on `device`; None: where its weights are."""

  stream: ChunkedDecoder
  device: jax.Device | None = None

  @functools.cached_property
  def _stream(self) -> ChunkedDecoder:
    return (
      dataclasses.replace(self.stream, params=jax.device_put(self.stream.params, self.device))
      if self.device
      else self.stream
    )

  def __call__(self, latents, memory: PyTree) -> tuple[np.ndarray, PyTree]:
    latents = jax.device_put(np.asarray(latents), self.device)
    pieces = list(self._stream.resume(latents, memory))
    return np.concatenate([pixels[0] for pixels, _ in pieces]), pieces[-1][1]

  def remember(self, leaves, latents) -> PyTree:
    if not leaves:
      return None
    shape = jax.ShapeDtypeStruct((1, 1, *latents[2:]), np.float32)
    _, memory = jax.eval_shape(self.stream.decode, self.stream.params, shape, None)
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(memory), leaves), self.device)


def make_decoder(components: Components, device: jax.Device | None = None) -> BlockDecoder:
  """device: where to decode; None: the first one.

  Small media decode there too: a few numbers a frame.
  """
  if isinstance(components, WanComponents):
    return CausalDecoder(components.stream, device)
  return FramewiseDecoder(components.pieces)
