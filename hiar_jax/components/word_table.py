"""The small worlds' text encoder: a word-level tokenizer and a frozen random table. It stands where
UMT5 stands.

A word's vector and its place in the sentence are fixed random directions; what they mean the DiT
learns.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from hiar_jax.errors import at_least
from hiar_jax.types import Text, Tokens, typed

PAD, UNKNOWN = "<pad>", "<unk>"


class WordTokenizer:
  """Words -> ids, padded with 0 to `length`. Id 1 is any unknown word."""

  def __init__(self, vocabulary: tuple[str, ...], length: int):
    ids = {word: i for i, word in enumerate((PAD, UNKNOWN, *vocabulary))}
    self.size, self.length, self._ids = len(ids), length, ids
    self._tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    self._tokenizer.normalizer = normalizers.Lowercase()
    self._tokenizer.pre_tokenizer = pre_tokenizers.Split(
      Regex(r"[^\p{L}\p{N}]+"), behavior="removed"
    )
    self._tokenizer.enable_truncation(length)
    self._tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=length)

  def __call__(self, prompt: str) -> np.ndarray:
    """[l] int32; what does not fit is cut off."""
    return np.asarray(self._tokenizer.encode(prompt).ids, np.int32)

  def unknown(self, prompt: str) -> list[str]:
    """Words of the prompt that the vocabulary lacks, in order."""
    return [word for word in dict.fromkeys(split(prompt)) if word not in self._ids]

  def cut_off(self, prompt: str) -> int:
    """How many words of the prompt do not fit."""
    return max(0, len(split(prompt)) - self.length)


def split(text: str) -> list[str]:
  """The words of a text: runs of letters and digits, in lower case."""
  return re.findall(r"[^\W_]+", text.lower())


def vocabulary_of(captions: list[str]) -> tuple[str, ...]:
  """All words of a data set, sorted: the vocabulary of a world that is not known beforehand."""
  return tuple(sorted({word for caption in captions for word in split(caption)}))


def word_table(size: int, length: int, dim: int, seed: int = 0) -> np.ndarray:
  """Frozen vectors: [size + length, dim], words then places, unit variance; the same for a seed on
  every machine.
  """
  return np.random.default_rng(seed).standard_normal((size + length, dim)).astype(np.float32)


@typed
def encode(table: np.ndarray, tokens: Tokens) -> Text:
  """tokens [b l] -> [b l d]; padding is zeroed, so the empty prompt is all zeros (the negative
  prompt).
  """
  length = tokens.shape[1]
  words, places = jnp.asarray(table[:-length]), jnp.asarray(table[-length:])
  return jnp.where(tokens[..., None] > 0, words[tokens] + places[None], 0.0)


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """length: tokens of a prompt; dim: width of the frozen word table."""

  kind: str = "words"
  length: int = 24
  dim: int = 64

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)
