"""Prompts with their encoded text as a TFDS data set, for distillation without the text encoder.

A record is {caption, text [l, d]}: only the tokens of the prompt, without padding. `PadText` gives
records one length.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.data import pipeline, tfds_builder
from hiar_jax.errors import UserError

_PROBED = 64  # prompts whose mean length decides how many records go into a shard


class Encoded(Protocol):
  """A source of text embeddings, as `umt5_encoder.TextCache`."""

  identity: str  # of the encoder and its weights; compared when a data set is resumed

  def prepare(self, prompts: Sequence[str]) -> None:
    """Encodes and stores the prompts that are not stored yet; may be interrupted and resumed."""

  def rows(self, prompt: str) -> np.ndarray:
    """Returns the text [l, d] of a prompt that `prepare` has stored."""


@dataclasses.dataclass
class PromptTextsConfig(tfds.core.BuilderConfig):
  prompts: tuple[str, ...] = ()
  texts: Encoded | None = None


class PromptTexts(tfds_builder.SequentialBuilder):
  """Builder of {text [l, d] in the encoder's dtype, caption}, in the order of the prompts file."""

  @property
  def count(self) -> int:
    return len(self.builder_config.prompts)

  @property
  def example_bytes(self) -> int:
    prompts = self.builder_config.prompts
    # Every k-th prompt, k rounded up, so at most _PROBED of them are read.
    probed = prompts[:: -(-len(prompts) // _PROBED)]
    return int(np.mean([self.builder_config.texts.rows(prompt).nbytes for prompt in probed]))

  def features(self) -> dict[str, Any]:
    config = self.builder_config
    text = config.texts.rows(config.prompts[0])
    return {
      # The number of tokens differs from prompt to prompt.
      "text": tfds_builder.tensor((None, *text.shape[1:]), text.dtype),
      "caption": tfds.features.Text(),
    }

  def examples(self) -> Iterator[dict[str, Any]]:
    config = self.builder_config
    for prompt in config.prompts:
      yield {"text": config.texts.rows(prompt), "caption": prompt}


def prepare(directory: str | os.PathLike, prompts_file: str | os.PathLike, texts: Encoded) -> None:
  """Writes the data set of a prompts file (one a line); does nothing if it is complete.

  Resumes where it was stopped: prompts that are encoded are not encoded again.

  Raises:
    UserError: no prompts, or the directory holds those of another file or encoder.
  """
  prompts = tuple(pipeline.read_prompts(prompts_file))
  digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
  recipe = {
    "kind": "prompt texts",
    "prompts": len(prompts),
    "digest": digest,
    "encoder": texts.identity,
  }
  tfds_builder.check_recipe(directory, recipe)
  if tfds_builder.is_complete(directory):
    return
  # Written before the work begins, so that an unfinished directory is refused to another recipe.
  tfds_builder.write_recipe(directory, recipe)
  texts.prepare(prompts)
  tfds_builder.build(
    PromptTexts, PromptTextsConfig(name="texts", prompts=prompts, texts=texts), directory
  )


def pad(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
  """Stacks texts [l_i, d] into [b, length, d], zeros after each.

  Raises:
    UserError: a text longer than `length`.
  """
  padded = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
  for i, row in enumerate(rows):
    if len(row) > length:
      raise UserError(
        f"a text of {len(row)} tokens does not fit into {length}; use the length that it was "
        "encoded with"
      )
    padded[i, : len(row)] = row
  return padded


@dataclasses.dataclass(frozen=True)
class PadText:
  """Maps a record to the same with text [length, d], so that records can be batched:
  `MapDataset.source(open_source(d)).map(PadText(512)).batch(8)`.
  """

  length: int

  def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "text": pad([record["text"]], self.length)[0]}
