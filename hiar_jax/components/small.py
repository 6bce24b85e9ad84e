"""The components of the small worlds: a patch PCA fitted on the data and a frozen word table.

prompt --WordTokenizer--> ids [b l] --word_table.encode--> text [b l d]
latents [b f h w c] --patch_pca.decode--> pixels [b f H W 3] --to_uint8--> uint8
uint8 [b f H W 3] --to_unit--> pixels --patch_pca.encode--> latents
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from hiar_jax.components import patch_pca, word_table
from hiar_jax.components.patch_pca import PatchPCA, load
from hiar_jax.components.word_table import TextConfig
from hiar_jax.types import LatentShape, Text, Video


@dataclasses.dataclass(frozen=True)
class SmallComponents:
  """`Components` of a run on a small world; both parts are read when they are first used."""

  text: TextConfig
  latent: LatentShape
  codec_file: pathlib.Path  # written by the data stage
  vocabulary: tuple[str, ...]

  # ---------------------------------------------------------------------- prompt -> tokens -> text

  @functools.cached_property
  def tokenizer(self) -> word_table.WordTokenizer:
    return word_table.WordTokenizer(self.vocabulary, self.text.length)

  def prepare(self, prompts: Sequence[str]) -> None:
    pass  # tokens are ids; looking them up costs nothing

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return np.stack([self.tokenizer(prompt) for prompt in prompts])

  @functools.cached_property
  def embed(self) -> Callable[[jax.Array], Text]:
    table = word_table.word_table(self.tokenizer.size, self.text.length, self.text.dim)
    return jax.jit(functools.partial(word_table.encode, table))

  def negative(self) -> Text:
    # the negative prompt is the empty one: padding (id 0) alone
    return self.embed(np.zeros((1, self.text.length), np.int32))

  def of_record(self, record: Mapping[str, Any]) -> np.ndarray:
    return self.tokenizer(record["caption"].decode())

  def warnings(self, prompt: str) -> list[str]:
    unknown = self.tokenizer.unknown(prompt)
    excess = self.tokenizer.cut_off(prompt)
    warnings = []
    if excess:
      warnings.append(
        f"prompt {prompt[:60]!r}...: the model reads {self.tokenizer.length} words; the last "
        f"{excess} are left out"
      )
    if unknown:
      warnings.append(
        f"prompt {prompt!r}: the model does not know {', '.join(map(repr, unknown))}; it is made "
        "without"
      )
    return warnings

  # ---------------------------------------------------------------------------- latents <-> pixels

  @functools.cached_property
  def codec(self) -> PatchPCA:
    return load(self.codec_file)

  @functools.cached_property
  def encode(self) -> Callable[[jax.Array], Video]:
    codec = self.codec
    return jax.jit(lambda video: patch_pca.encode(codec, patch_pca.to_unit(video)))

  def pieces(self, latents) -> Iterator[np.ndarray]:
    # one piece: a small world's whole video fits into memory
    yield patch_pca.to_uint8(jax.jit(patch_pca.decode)(self.codec, latents))

  def latents(self, video: np.ndarray) -> np.ndarray:
    return np.asarray(patch_pca.encode(self.codec, patch_pca.to_unit(video)))
