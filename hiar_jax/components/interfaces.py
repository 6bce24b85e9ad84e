"""The interface of text encoder and autoencoder: prompt -> tokens -> text, latents <-> pixels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.types import Batch, LatentShape, Text, Video


@dataclasses.dataclass(frozen=True)
class Task:
  """The part of the components that training steps trace.

  encode: batch -> latents [b f h w c].
  embed: the tokens of a batch (ids [b l], or texts [b l d] encoded beforehand) -> text [b l d].
  negative: text [b l d] -> the text of the negative prompt, for classifier-free guidance.
  latent: sizes of a clip's latents.
  """

  encode: Callable[[Batch], Video]
  embed: Callable[[jax.Array], Text]
  negative: Callable[[Text], Text]
  latent: LatentShape


class Components(Protocol):
  """A text encoder and an autoencoder, as the host uses them.

  The tokens of a prompt are the input of `task.embed`: word ids, or the encoded text itself.
  """

  task: Task

  # prompt -> tokens

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes all prompts at once, before a loop asks for them one by one."""

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """Ids [n l], or texts [n l d], of n prompts."""

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    """Tokens of a data set's record: its stored text where it has one, else of its caption."""

  def warnings(self, prompt: str) -> list[str]:
    """Warnings about the words that the encoder does not know or does not read, one line each."""

  # latents <-> pixels

  def pieces(self, latents) -> Iterator[np.ndarray]:
    """Decodes latents [b f h w c] into consecutive pieces uint8 [b F_i H W 3]."""

  def latents(self, video: np.ndarray) -> np.ndarray:
    """Encodes a video uint8 [b F H W 3] into latents [b f h w c]."""


def decode_pixels(components: Components, latents) -> np.ndarray:
  """Decodes latents [b f h w c] into one array uint8 [b F H W 3]."""
  return np.concatenate(list(components.pieces(latents)), axis=1)
