"""Prompts -> text embeddings, kept on disk: UMT5-XXL (11 GB) is loaded only for prompts that were
never seen, and freed at once.

    <directory>/<encoder>/<prompt>.safetensors     text [l, d] of the prompt without padding

<encoder> names the weights, the tokenizer, the dtype and the length, <prompt> the cleaned prompt,
so nothing stale is ever read.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save
import tqdm

from hiar_jax.checkpoints import weights
from hiar_jax.components import umt5_tokenizer
from hiar_jax.data.prompt_texts import pad
from hiar_jax.errors import UserError, at_least
from hiar_jax.files import write_atomic
from hiar_jax.models import umt5

DTYPES = ("bfloat16", "float32")
_LOADING = threading.Lock()  # data is read by several threads; one encoder at a time is in memory
# tokens: prompts are encoded at a multiple of it; short ones cost an eighth of the full length, and
# little is compiled
_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class TextCache:
  """Text embeddings of prompts, from the encoder in `weights` (folders umt5/ and tokenizer/) or
  from `directory`.

  dtype: that of weights, activations and result. length: tokens, longer prompts are cut, and that
  is said. batch: prompts encoded at once. Hosts that share the directory fill different prompts.

  A prompt's numbers do not depend on the others: every batch of a length has the same shape, filled
  up where it is short.

  Raises:
    UserError: no encoder or tokenizer there, or an unknown dtype.
  """

  weights: str | os.PathLike
  directory: str | os.PathLike
  dtype: str = "bfloat16"
  length: int = umt5_tokenizer.LENGTH
  batch: int = 4

  def __post_init__(self):
    at_least(1, batch=self.batch)
    if self.dtype not in DTYPES:
      raise UserError(f"texts of dtype {self.dtype!r} asked for; use {' or '.join(DTYPES)}")
    self.identity  # noqa: B018  says at once what is missing

  @functools.cached_property
  def tokenizer(self) -> umt5_tokenizer.Tokenizer:
    return umt5_tokenizer.Tokenizer(self.weights, self.length)

  @functools.cached_property
  def identity(self) -> str:
    """Names the encoder and everything about it that changes the numbers."""
    encoder = weights.fingerprint(self.weights, "umt5")
    return f"{encoder}-{self.tokenizer.fingerprint}-{self.dtype}-{self.length}"

  def __call__(self, prompts: Sequence[str]) -> np.ndarray:
    """Embeddings [b, length, d], zero on padding; encodes what is not there."""
    self.fill(prompts)
    return pad([self.rows(prompt) for prompt in prompts], self.length)

  def missing(self, prompts: Sequence[str]) -> list[str]:
    """The prompts that are still to be encoded, each once."""
    unique = {self._path(prompt): prompt for prompt in prompts}
    return [prompt for path, prompt in unique.items() if not path.is_file()]

  def fill(self, prompts: Sequence[str]) -> None:
    """Encodes the prompts that are not there yet; loads the encoder only if there are any.

    Each is kept as soon as it is done.
    """
    self._tell_cut(prompts)
    if not self.missing(prompts):
      return
    with _LOADING:
      if missing := self.missing(prompts):  # another thread may just have done it
        self._encode(missing)

  def _encode(self, missing: Sequence[str]) -> None:
    with (
      _encoder(self) as encode,
      tqdm.tqdm(desc="texts", total=len(missing), unit="prompt") as bar,
    ):
      for chosen, ids, mask in self._batches(missing):
        text = encode(ids, mask)
        # the batch may be filled up
        for prompt, row, count in zip(chosen, text, mask.sum(axis=1), strict=False):
          self._write(prompt, row[:count])
        bar.update(len(chosen))

  def rows(self, prompt: str) -> np.ndarray:
    """The text [l, d] of a prompt that was filled in, without padding.

    Raises:
      UserError: it is not there, or damaged (then it is removed).
    """
    path = self._path(prompt)
    if not path.is_file():
      raise UserError(f"prompt {prompt[:60]!r} is not in {path.parent}; encode it first")
    try:
      ((_, tensor),) = safetensors.deserialize(path.read_bytes())
      return np.frombuffer(tensor["data"], jnp.dtype(self.dtype)).reshape(tensor["shape"])
    except (safetensors.SafetensorError, ValueError) as error:
      path.unlink()
      raise UserError(
        f"{path} is damaged ({error}) and was removed; run again to encode its prompt anew"
      ) from error

  def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """(prompts, ids, mask), short prompts first; ids and mask [batch, l] with l the least multiple
    of `_BUCKET` that fits them.
    """
    tokens = self.tokenizer(prompts)
    buckets = -(-tokens.mask.sum(axis=1) // _BUCKET)
    for bucket in np.unique(buckets):
      rows, width = np.flatnonzero(buckets == bucket), min(bucket * _BUCKET, self.length)
      for start in range(0, len(rows), self.batch):
        chosen = rows[start : start + self.batch]
        filled = np.resize(chosen, self.batch)
        yield [prompts[i] for i in chosen], tokens.ids[filled, :width], tokens.mask[filled, :width]

  def _path(self, prompt: str) -> pathlib.Path:
    digest = hashlib.sha256(umt5_tokenizer.clean(prompt).encode()).hexdigest()[:32]
    return pathlib.Path(self.directory) / self.identity / f"{digest}.safetensors"

  def _write(self, prompt: str, text: np.ndarray) -> None:
    if not np.isfinite(text.astype(np.float32)).all():
      raise UserError(
        f"the text of prompt {prompt[:60]!r} is not finite in {self.dtype}; check the encoder's "
        "weights"
      )
    write_atomic(
      self._path(prompt),
      save({"text": np.ascontiguousarray(text)}, {"prompt": umt5_tokenizer.clean(prompt)}),
    )

  @functools.cached_property
  def _told(self) -> set[str]:
    """Prompts that were looked at: data is read over and over, what is cut is said once."""
    return set()

  def _tell_cut(self, prompts: Sequence[str]) -> None:
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._told]
    self._told.update(new)
    for prompt, cut in zip(new, self.tokenizer(new).cut, strict=True):
      if cut:
        print(
          f"prompt {prompt[:60]!r}...: {self.length + cut} tokens, the encoder reads "
          f"{self.length}; the last {cut} are left out",
          file=sys.stderr,
        )


Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids, mask [b l] -> text [b l d]


@contextlib.contextmanager
def _encoder(cache: TextCache) -> Iterator[Encode]:
  """The encoder, in memory while the block runs and no longer."""
  # In a thread of its own: neither the mesh that is set here, nor a step that is being traced and
  # asks for a text, reaches there.
  with futures.ThreadPoolExecutor(1) as apart:
    config, params = apart.submit(weights.load, cache.weights, "umt5", dtype=cache.dtype).result()
    config = dataclasses.replace(config, dtype=jnp.dtype(cache.dtype))
    encode = jax.jit(lambda params, ids, mask: umt5.encode_text(params, ids, mask, config))
    try:
      yield lambda ids, mask: apart.submit(lambda: np.asarray(encode(params, ids, mask))).result()
    finally:
      for leaf in jax.tree.leaves(params):
        leaf.delete()  # at once, whoever else holds the tree
