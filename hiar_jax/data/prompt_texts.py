"""Prompts with their encoded text as a TFDS data set, for distillation without the text encoder.

A record is {text [l, d], caption}, in the order of the prompts file and the encoder's dtype: only
the tokens of the prompt, without padding. `pad` gives texts one length.
"""

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.data import tfds_builder
from hiar_jax.data.prompt_rows import read_prompts
from hiar_jax.errors import UserError

_PROBED = 64  # prompts whose mean length decides how many records go into a shard


def prepare(directory: str | os.PathLike, prompts_file: str | os.PathLike, texts: Any) -> None:
  """Writes the data set of a prompts file (data.prompt_rows); does nothing if it is complete.

  Resumes where it was stopped: prompts that are encoded are not encoded again.

  texts: a `umt5_encoder.TextCache`: `identity` of the encoder and its weights, which is compared
  when a data set is resumed; `fill(prompts)`, which encodes and stores those that are not stored
  yet; `rows(prompt)`, the text [l, d] of one that is.

  Raises:
    UserError: no prompts, or the directory holds those of another file or encoder.
  """
  prompts = tuple(read_prompts(prompts_file))
  recipe = {
    "kind": "prompt texts",
    "prompts": len(prompts),
    "digest": digest(prompts),
    "encoder": texts.identity,
  }
  tfds_builder.check_recipe(directory, recipe)
  if tfds_builder.is_complete(directory):
    return
  # Written before the work begins, so that an unfinished directory is refused to another recipe.
  tfds_builder.write_recipe(directory, recipe)
  texts.prepare(prompts)
  # Every k-th prompt, k rounded up, so at most _PROBED of them are read.
  probed = [texts.rows(prompt) for prompt in prompts[:: -(-len(prompts) // _PROBED)]]
  features = {
    # The number of tokens differs from prompt to prompt.
    "text": tfds_builder.tensor((None, *probed[0].shape[1:]), probed[0].dtype),
    "caption": tfds.features.Text(),
  }
  tfds_builder.build(
    directory,
    "prompt_texts/texts",
    features,
    ({"text": texts.rows(prompt), "caption": prompt} for prompt in prompts),
    count=len(prompts),
    example_bytes=int(np.mean([text.nbytes for text in probed])),
  )


def digest(prompts: Sequence[str]) -> str:
  """Returns what tells a list of prompts from others."""
  return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


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


def tokens_of(record: Mapping[str, Any], texts: Any, length: int) -> np.ndarray:
  """Returns the tokens of a data set's record: those that it stores, [l] or [l d], else its
  caption's. texts: a TextEncoder; length: of its tokens.
  """
  if "text" in record:  # stored without its padding
    return pad([record["text"]], length)[0]
  return texts.tokens([record["caption"].decode()])[0]
