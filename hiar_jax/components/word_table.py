"""The text encoder of the small worlds: a word-level tokenizer and a frozen random table.

The vector of a token is that of its word plus that of its position in the prompt, both fixed random
directions; their meaning is learnt by the DiT's cross-attention. It takes the role of UMT5.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from hiar_jax.errors import at_least
from hiar_jax.types import Text, Tokens, typed

PAD, UNKNOWN = "<pad>", "<unk>"  # ids 0 and 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """length: tokens of a prompt; dim: width of the frozen word table."""

  kind: str = "words"
  length: int = 24
  dim: int = 64

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)


class WordTokenizer:
  """Words -> ids, padded with 0 to `length`; id 1 is any unknown word."""

  def __init__(self, vocabulary: tuple[str, ...], length: int):
    # ids are positions in this order; the trained DiT depends on it
    ids = {word: i for i, word in enumerate((PAD, UNKNOWN, *vocabulary))}
    self._ids = ids
    self.size = len(ids)
    self.length = length
    self._tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # the same words as those of `split`, which reads the vocabulary from captions
    self._tokenizer.normalizer = normalizers.Lowercase()
    self._tokenizer.pre_tokenizer = pre_tokenizers.Split(
      Regex(r"[^\p{L}\p{N}]+"), behavior="removed"
    )
    self._tokenizer.enable_truncation(length)
    self._tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=length)

  def __call__(self, prompt: str) -> np.ndarray:
    """Ids int32 [l]; words beyond the length are cut off."""
    return np.asarray(self._tokenizer.encode(prompt).ids, np.int32)

  def unknown(self, prompt: str) -> list[str]:
    """Words of the prompt that the vocabulary lacks, each once, in order."""
    return [word for word in dict.fromkeys(split(prompt)) if word not in self._ids]

  def cut_off(self, prompt: str) -> int:
    """The number of words of the prompt beyond the length."""
    return max(0, len(split(prompt)) - self.length)


def split(text: str) -> list[str]:
  """The words of a text: runs of letters and digits, in lower case."""
  return re.findall(r"[^\W_]+", text.lower())


def vocabulary_of(captions: list[str]) -> tuple[str, ...]:
  """All words of a data set's captions, sorted, so that the ids do not depend on their order."""
  return tuple(sorted({word for caption in captions for word in split(caption)}))


def word_table(size: int, length: int, dim: int, seed: int = 0) -> np.ndarray:
  """Frozen vectors of unit variance, float32 [size + length, dim]: words, then positions.

  NumPy's generator gives the same numbers on every machine, so the table is not stored.
  """
  return np.random.default_rng(seed).standard_normal((size + length, dim)).astype(np.float32)


@typed
def encode(table: np.ndarray, tokens: Tokens) -> Text:
  """Tokens [b l] -> text [b l d]; padding is zero, so the empty (negative) prompt is all zeros."""
  length = tokens.shape[1]
  words, positions = jnp.asarray(table[:-length]), jnp.asarray(table[-length:])
  return jnp.where(tokens[..., None] > 0, words[tokens] + positions[None], 0.0)
