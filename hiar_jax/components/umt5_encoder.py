"""Prompts -> text embeddings, cached on disk.

    <directory>/<encoder>/<prompt>.safetensors     text [l d] of the prompt without padding

UMT5-XXL (11 GB in bfloat16) is loaded only while there are prompts to encode. <encoder> is a
fingerprint of weights, tokenizer, dtype and length, <prompt> one of the cleaned prompt, so other
weights or settings never read each other's texts.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save
import tqdm

from hiar_jax.checkpoints import weights
from hiar_jax.components import umt5_tokenizer
from hiar_jax.components.interfaces import NetworkSizes, TextEncoderConfig
from hiar_jax.config.building import path_field
from hiar_jax.data.prompt_texts import pad
from hiar_jax.errors import Damaged, UserError, at_least, one_of
from hiar_jax.files import write_atomic
from hiar_jax.models import umt5
from hiar_jax.types import DTYPES, Text

# Data is read by several threads; one encoder at a time may be in memory.
_LOADING = threading.Lock()
# Prompts are encoded at multiples of so many tokens: a short one costs 64 tokens instead of 512,
# and at most 8 shapes are compiled.
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class UMT5TextConfig(TextEncoderConfig):
  """UMT5 and its tokenizer.

  weights: a directory made by hiar_jax.convert. cache: directory of encoded texts, by default
  <weights>/texts. length: tokens of a prompt; dim: width of the text.
  """

  kind: str = "umt5"
  weights: str = path_field()
  cache: str = path_field()
  dtype: str = "bfloat16"
  length: int = umt5_tokenizer.LENGTH
  dim: int = 4096

  def __post_init__(self):
    at_least(1, length=self.length, dim=self.dim)
    one_of(DTYPES, **{"text.dtype": self.dtype})

  def open(self, directory, words=tuple) -> "TextCache":
    cache = self.cache or str(pathlib.Path(self.weights) / "texts")
    return TextCache(self.weights, cache, dtype=self.dtype, length=self.length)

  @property
  def published(self) -> tuple[str, str]:
    return self.weights, "umt5"

  def with_weights(self, directory: str) -> "UMT5TextConfig":
    found = directory and weights.exists(directory, "umt5")
    return dataclasses.replace(self, weights=directory) if found else self

  def networks(self) -> NetworkSizes:
    config = weights.read_config(self.weights, "umt5", umt5.UMT5Config())
    return {"UMT5": (umt5.abstract_params(config), self.dtype)}


@dataclasses.dataclass(frozen=True)
class TextCache:
  """A `TextEncoder`: text embeddings, read from `directory` or made by the encoder in `weights`.

  The tokens of a prompt are its text: UMT5 is too large to run in the training loop.

  weights: a directory with umt5/ and tokenizer/. dtype: of weights, activations and result.
  length: tokens; longer prompts are cut (`warnings`). batch: prompts encoded at once.

  The text of a prompt does not depend on the prompts beside it. Hosts that share the directory must
  encode different prompts: the temporary name of a file is fixed.

  Raises:
    UserError: no encoder or tokenizer there, or an unknown dtype.
  """

  weights: str | os.PathLike
  directory: str | os.PathLike
  dtype: str = "bfloat16"
  length: int = umt5_tokenizer.LENGTH
  batch: int = 4
  negative_prompt = umt5_tokenizer.NEGATIVE_PROMPT

  def __post_init__(self):
    at_least(1, batch=self.batch)
    one_of(DTYPES, **{"text.dtype": self.dtype})
    self.identity  # noqa: B018  reads the fingerprints now, so missing files are an error here

  @functools.cached_property
  def tokenizer(self) -> umt5_tokenizer.Tokenizer:
    return umt5_tokenizer.Tokenizer(self.weights, self.length)

  @functools.cached_property
  def identity(self) -> str:
    """A name of the encoder and of all its settings that change the numbers."""
    encoder = weights.describe(self.weights, "umt5").fingerprint
    return f"{encoder}-{self.tokenizer.fingerprint}-{self.dtype}-{self.length}"

  def tokens(self, prompts: Sequence[str]) -> np.ndarray:
    """Embeddings [b length d], zero on padding; encodes the missing ones first."""
    self.prepare(prompts)
    return pad([self.rows(prompt) for prompt in prompts], self.length)

  @staticmethod
  @jax.jit
  def embed(tokens) -> Text:
    return tokens.astype(jnp.float32)

  def warnings(self, prompt: str) -> list[str]:
    (cut,) = self.tokenizer([prompt]).cut  # it has no unknown words
    if not cut:
      return []
    return [
      f"prompt {prompt[:60]!r}...: {self.length + cut} tokens, the encoder reads {self.length}; "
      f"the last {cut} are left out"
    ]

  def missing(self, prompts: Sequence[str]) -> list[str]:
    """The prompts that have no file yet, each once."""
    # by path: prompts that are equal once cleaned share a file
    unique = {self._path(prompt): prompt for prompt in prompts}
    return [prompt for path, prompt in unique.items() if not path.is_file()]

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes the missing prompts, loading the encoder only if there are any.

    Each is written as soon as it is encoded, so a stopped call loses at most a batch. Raises
    UserError for a text that is not finite.
    """
    if not self.missing(prompts):
      return
    with _LOADING:
      # again, inside the lock: another thread may have encoded them meanwhile
      if missing := self.missing(prompts):
        self._encode(missing)

  def _encode(self, missing: Sequence[str]) -> None:
    with (
      _encoder(self) as encode,
      tqdm.tqdm(desc="texts", total=len(missing), unit="prompt") as bar,
    ):
      for chosen, ids, mask in self._batches(missing):
        text = encode(ids, mask)
        # not strict: the last batch repeats prompts up to its size
        for prompt, row, count in zip(chosen, text, mask.sum(axis=1), strict=False):
          row = np.ascontiguousarray(row[:count])
          if not np.isfinite(row.astype(np.float32)).all():
            raise UserError(
              f"the text of prompt {prompt[:60]!r} is not finite in {self.dtype}; check the "
              "encoder's weights"
            )
          content = save({"text": row}, {"prompt": umt5_tokenizer.clean(prompt)})
          write_atomic(self._path(prompt), content)
        bar.update(len(chosen))

  def rows(self, prompt: str) -> np.ndarray:
    """The text [l d] of one prompt, without padding, from its file.

    Raises:
      UserError: the file is missing, or damaged (then it is removed).
    """
    path = self._path(prompt)
    if not path.is_file():
      raise UserError(f"prompt {prompt[:60]!r} is not in {path.parent}; encode it first")
    try:
      ((_, tensor),) = safetensors.deserialize(path.read_bytes())
      # not safetensors.numpy.load, which knows no bfloat16
      return np.frombuffer(tensor["data"], jnp.dtype(self.dtype)).reshape(tensor["shape"])
    except (safetensors.SafetensorError, ValueError) as error:
      path.unlink()
      advice = "it was removed; run again to encode its prompt anew"
      raise Damaged(path, error, advice) from error

  def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Yields (prompts, ids, mask), short prompts first.

    ids and mask are int32 [batch l], l the smallest multiple of `_BUCKET` that holds the prompts.
    """
    tokens = self.tokenizer(prompts)
    buckets = -(-tokens.mask.sum(axis=1) // _BUCKET)
    for bucket in np.unique(buckets):
      rows = np.flatnonzero(buckets == bucket)
      width = min(bucket * _BUCKET, self.length)
      for start in range(0, len(rows), self.batch):
        chosen = rows[start : start + self.batch]
        # A short batch repeats its prompts: one shape a bucket, so one program, and the numbers of
        # a prompt do not depend on how many there are.
        filled = np.resize(chosen, self.batch)
        yield [prompts[i] for i in chosen], tokens.ids[filled, :width], tokens.mask[filled, :width]

  def _path(self, prompt: str) -> pathlib.Path:
    digest = hashlib.sha256(umt5_tokenizer.clean(prompt).encode()).hexdigest()[:32]
    return pathlib.Path(self.directory) / self.identity / f"{digest}.safetensors"


Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids, mask [b l] -> text [b l d]


@contextlib.contextmanager
def _encoder(cache: TextCache) -> Iterator[Encode]:
  """Loads the encoder for the `with` block and frees its memory at the end."""
  # JAX's mesh and trace are per thread. In a thread of its own the encoder runs outside the
  # caller's mesh, and eagerly even where the caller is a step being traced (the negative prompt).
  with futures.ThreadPoolExecutor(1) as executor:
    config, params = executor.submit(
      weights.load, cache.weights, "umt5", dtype=cache.dtype
    ).result()
    config = dataclasses.replace(config, dtype=jnp.dtype(cache.dtype))
    encode = jax.jit(lambda params, ids, mask: umt5.encode_text(params, ids, mask, config))
    try:
      yield lambda ids, mask: executor.submit(
        lambda: np.asarray(encode(params, ids, mask))
      ).result()
    finally:
      # now, not when the last reference goes: the network needs the 11 GB
      for leaf in jax.tree.leaves(params):
        leaf.delete()
