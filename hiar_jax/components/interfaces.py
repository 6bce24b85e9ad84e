"""What a component is: prompts become what the model reads, its latents become pixels, and back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.types import Batch, LatentShape, Text, Video


@dataclasses.dataclass(frozen=True)
class Task:
  """encode: batch -> latents [b f h w c]; embed: a batch's tokens (ids [b l], or texts already) ->
  text [b l d].

  negative: the text that guidance leads away from, for texts of that shape. latent: sizes of a
  clip's latents.
  """

  encode: Callable[[Batch], Video]
  embed: Callable[[jax.Array], Text]
  negative: Callable[[Text], Text]
  latent: LatentShape


class Components(Protocol):
  """task: what the steps know of it.

  A prompt's tokens are what `task.embed` takes: word ids, or the text itself.
  """

  task: Task

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes what needs an encoder of its own, all at once, before a loop asks for one prompt
    after another.
    """

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """[n l] ids or [n l d] texts."""

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    """The tokens of one record of a data set: of its text where it brings one, else of its
    caption.
    """

  def remarks(self, prompt: str) -> list[str]:
    """What the model will not understand of it, a line each."""

  def pieces(self, latents) -> Iterator[np.ndarray]:
    """Latents [b f h w c] -> pieces uint8 [b F_i H W 3], in order."""

  def latents(self, video: np.ndarray) -> np.ndarray:
    """uint8 [b F H W 3] -> [b f h w c]."""


def decode_pixels(components: Components, latents) -> np.ndarray:
  """Latents [b f h w c] -> uint8 [b F H W 3]."""
  return np.concatenate(list(components.pieces(latents)), axis=1)
