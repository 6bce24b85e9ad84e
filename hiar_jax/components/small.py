"""The components of the small worlds: a codec fitted on the data, and a frozen word table."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.components import patch_pca, word_table
from hiar_jax.components.interfaces import Task
from hiar_jax.components.patch_pca import PatchPCA, load
from hiar_jax.components.word_table import TextConfig
from hiar_jax.types import LatentShape


@dataclasses.dataclass(frozen=True)
class SmallComponents:
  """A fitted codec, a frozen word table over `vocabulary`."""

  text: TextConfig
  latent: LatentShape
  codec_file: pathlib.Path
  vocabulary: tuple[str, ...]

  @functools.cached_property
  def tokenizer(self) -> word_table.WordTokenizer:
    return word_table.WordTokenizer(self.vocabulary, self.text.length)

  @functools.cached_property
  def codec(self) -> PatchPCA:
    return load(self.codec_file)

  @functools.cached_property
  def task(self) -> Task:
    """Closes over the fitted codec and the frozen word table."""
    codec = self.codec
    table = word_table.word_table(self.tokenizer.size, self.text.length, self.text.dim)
    embed = lambda tokens: word_table.encode(table, tokens)
    return Task(
      encode=lambda batch: patch_pca.encode(codec, patch_pca.to_unit(batch["video"])),
      embed=embed,
      negative=lambda text: embed(jnp.zeros(text.shape[:2], jnp.int32)),  # the empty prompt
      latent=self.latent,
    )

  def prepare(self, prompts: Sequence[str]) -> None:
    pass  # a table lookup

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return np.stack([self.tokenizer(prompt) for prompt in prompts])

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    return self.tokenizer(record["caption"].decode())

  def remarks(self, prompt: str) -> list[str]:
    unknown, too_many = self.tokenizer.unknown(prompt), self.tokenizer.cut_off(prompt)
    lines = []
    if too_many:
      lines.append(
        f"prompt {prompt[:60]!r}...: the model reads {self.tokenizer.length} words; the last "
        f"{too_many} are left out"
      )
    if unknown:
      lines.append(
        f"prompt {prompt!r}: the model does not know {', '.join(map(repr, unknown))}; it is made "
        "without"
      )
    return lines

  def pieces(self, latents) -> Iterator[np.ndarray]:
    yield patch_pca.to_uint8(jax.jit(patch_pca.decode)(self.codec, latents))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(patch_pca.encode(self.codec, patch_pca.to_unit(video)))
