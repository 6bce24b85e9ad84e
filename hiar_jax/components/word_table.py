"""The text encoder of the small worlds: a word-level tokenizer and a frozen random table.

    prompt --tokens--> ids [l] --embed--> text [l d]

The vector of a token is that of its word plus that of its position in the prompt, both fixed random
directions; their meaning is learnt by the DiT's cross-attention. It takes the role of UMT5.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, pre_tokenizers

from hiar_jax.components.interfaces import TextEncoderConfig
from hiar_jax.data.prompt_texts import pad
from hiar_jax.errors import at_least
from hiar_jax.files import write_atomic
from hiar_jax.types import Text, Tokens, typed

PAD, UNKNOWN = "<pad>", "<unk>"  # ids 0 and 1
FILE = "words.json"  # the words, in the order of their ids; the trained network depends on it

# Scripts that set no blanks between words: each letter, with its marks, is a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A word of others: letters and digits, with vowel signs and joiners (Hindi, Persian) in and after.
_WORDS = pre_tokenizers.Split(
  Regex(
    rf"(?=[{_UNSPACED}])[\p{{L}}\p{{N}}]\p{{M}}*"
    rf"|[\p{{L}}\p{{N}}](?:(?![{_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}\u200C\u200D])*"
  ),
  behavior="removed",
  invert=True,  # what matches is kept
)


@dataclasses.dataclass(frozen=True)
class WordTableConfig(TextEncoderConfig):
  """length: tokens of a prompt; dim: width of the frozen word table."""

  kind: str = "words"
  length: int = 24
  dim: int = 64
  fitted_files = (FILE,)

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)

  def fit(self, directory: pathlib.Path, words: tuple[str, ...]) -> None:
    if not (directory / FILE).exists():
      write_atomic(directory / FILE, json.dumps(words, ensure_ascii=False).encode())

  def open(
    self, directory: pathlib.Path, words: Callable[[], tuple[str, ...]] = tuple
  ) -> "WordTable":
    # runs from before the file was written know their words from the data alone
    stored = directory / FILE
    known = json.loads(stored.read_text("utf-8")) if stored.exists() else words()
    return WordTable(tuple(known), self.length, self.dim)


@dataclasses.dataclass(frozen=True)
class WordTable:
  """A `TextEncoder`: words -> ids, padded with 0 to `length` (id 1 is any unknown word) -> vectors
  of width `dim`.
  """

  vocabulary: tuple[str, ...]
  length: int
  dim: int
  identity = ""
  # padding alone, of which the text is zero
  negative_prompt = ""

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    # folded: a table of words may be older than the way in which they are folded now
    return {fold(word): i for i, word in enumerate((PAD, UNKNOWN, *self.vocabulary))}

  def prepare(self, prompts: Sequence[str]) -> None:
    pass  # looking up ids costs nothing

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    return pad([self.rows(prompt) for prompt in prompts], self.length)

  @functools.cached_property
  def embed(self) -> Callable[[jax.Array], Text]:
    table = word_table(2 + len(self.vocabulary), self.length, self.dim)
    return jax.jit(functools.partial(encode, table))

  def rows(self, prompt: str) -> np.ndarray:
    ids = [self.ids.get(word, self.ids[UNKNOWN]) for word in split(prompt)]
    return np.asarray(ids[: self.length], np.int32)

  def warnings(self, prompt: str) -> list[str]:
    words = split(prompt)
    unknown = [word for word in dict.fromkeys(words) if word not in self.ids]
    name = f"prompt {prompt[:60]!r}" + "..." * (len(prompt) > 60)
    warnings = []
    if prompt.strip() and not words:
      warnings.append(f"{name}: holds no word; it is read as the empty prompt")
    if len(words) > self.length:
      warnings.append(
        f"{name}: the model reads {self.length} words; the last {len(words) - self.length} are "
        "left out"
      )
    if unknown:
      more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
      shown = ", ".join(map(repr, unknown[:8])) + more
      warnings.append(f"{name}: the model does not know {shown}; it is made without")
    return warnings


def fold(text: str) -> str:
  """Returns a text in which the ways to write a word are one: composed characters (NFKC) in lower
  case, with one sigma.
  """
  # Not str.casefold: it turns the German sharp s into two letters, which would move the ids of
  # runs that know such words. Lower case has two sigmas, one of them for the end of a word.
  lower = unicodedata.normalize("NFKC", text).lower().replace("ς", "σ")
  return unicodedata.normalize("NFKC", lower)


def split(text: str) -> list[str]:
  """The words of a text, folded: runs of letters, their marks and digits; single characters of
  scripts that set no blanks between words.
  """
  # half a character, as of a broken command line, is none
  whole = fold(text).encode("utf-8", "replace").decode()
  return [word for word, _ in _WORDS.pre_tokenize_str(whole)]


def vocabulary_of(captions: Sequence[str]) -> tuple[str, ...]:
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
