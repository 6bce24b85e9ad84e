"""The interface of text encoder and autoencoder: prompt -> tokens -> text, latents <-> pixels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.types import Text, Video


class Components(Protocol):
  """A text encoder and an autoencoder.

  The tokens of a prompt are what a data set's record gives a batch: word ids, or the encoded text
  itself, where encoding is too slow for the loop. `embed` and `encode` take device arrays.
  """

  # prompt -> tokens -> text

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes all prompts at once, before a loop asks for them one by one."""

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """Ids [n l], or texts [n l d], of n prompts."""

  def embed(self, tokens: jax.Array) -> Text:
    """Text [n l d] of tokens, as the network reads it; jitted."""

  def negative(self) -> Text:
    """Text [1 l d] of the negative prompt, for classifier-free guidance."""

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    """Tokens of a data set's record: its stored text where it has one, else of its caption."""

  def warnings(self, prompt: str) -> list[str]:
    """Warnings about the words that the encoder does not know or does not read, one line each."""

  # latents <-> pixels

  def encode(self, video: jax.Array) -> Video:
    """Encodes a batch of clips uint8 [b F H W 3] into latents [b f h w c]; jitted."""

  def pieces(self, latents) -> Iterator[np.ndarray]:
    """Decodes latents [b f h w c] into consecutive pieces uint8 [b F_i H W 3]."""

  def latents(self, video: np.ndarray) -> np.ndarray:
    """Encodes a video uint8 [b F H W 3] into latents [b f h w c]."""


def decode_pixels(components: Components, latents) -> np.ndarray:
  """Decodes latents [b f h w c] into one array uint8 [b F H W 3]."""
  return np.concatenate(list(components.pieces(latents)), axis=1)
