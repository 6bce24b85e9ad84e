"""Prompts -> UMT5's token ids, as Wan2.1 feeds them to its text encoder (wan/modules/tokenizers.py,
clean="whitespace").

The tokenizer itself is data: `tokenizer.json`, published beside the weights in google/umt5-xxl/.
"""

from collections.abc import Sequence
import hashlib
import html
import os
import pathlib
from typing import NamedTuple

import ftfy
import numpy as np
import tokenizers

from hiar_jax.errors import UserError, at_least
from hiar_jax.types import Tokens

# tokens of a prompt, end mark included (Wan2.1, wan/configs/shared_config.py: text_len)
LENGTH = 512
END, PAD = "</s>", "<pad>"
FILE = "tokenizer.json"
# converted weights, diffusers' folders, the original ones
_PLACES = ("", "tokenizer", "google/umt5-xxl")
_PUBLISHED = "Wan2.1's download has one in google/umt5-xxl/"

# What Wan2.1 steers away from (wan/configs/shared_config.py: sample_neg_prompt); Self-Forcing and
# HiAR use the same words.
NEGATIVE_PROMPT = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
  "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class PromptTokens(NamedTuple):
  """Tokenised prompts.

  ids, mask: int32 [b l], mask 1 on tokens and 0 on padding; cut: how many tokens each prompt lost,
  [b].
  """

  ids: Tokens
  mask: Tokens
  cut: tuple[int, ...]


def clean(prompt: str) -> str:
  """The text that is tokenised: broken encodings and HTML entities repaired, every run of white
  space one blank, none at the ends.
  """
  fixed = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return " ".join(fixed.split())


class Tokenizer:
  """UMT5's tokenizer, from `tokenizer.json` or a folder that holds it (converted weights, Wan2.1's
  or diffusers' download).

  Raises:
    UserError: no such file, or it is not UMT5's kind of tokenizer.
  """

  def __init__(self, path: str | os.PathLike, length: int = LENGTH):
    at_least(2, length=length)
    self.path, self.length = find(path), length
    content = self.path.read_bytes()
    self.fingerprint = hashlib.sha256(content).hexdigest()[:12]
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # all that the library raises
      raise UserError(
        f"{self.path} is no tokenizer file ({error}); copy it again, {_PUBLISHED}"
      ) from error
    # The file may ask for another length; ours is counted here, so that what is cut can be told.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._end, self._pad = (self._tokenizer.token_to_id(token) for token in (END, PAD))
    if self._end is None or self._pad is None or self._tokenizer.encode("").ids != [self._end]:
      raise UserError(
        f"{self.path} does not close prompts with {END} and fill them up with {PAD}, as UMT5's "
        f"does; {_PUBLISHED}"
      )

  def __call__(self, prompts: Sequence[str]) -> PromptTokens:
    """Prompts, not cleaned yet -> ids and mask of `length` tokens each. One that is too long keeps
    its beginning and the end mark.

    Raises:
      UserError: a prompt that is not valid Unicode text.
    """
    pieces = [
      encoding.ids
      for encoding in self._tokenizer.encode_batch([clean(_checked(prompt)) for prompt in prompts])
    ]
    ids = np.full((len(pieces), self.length), self._pad, np.int32)
    mask = np.zeros_like(ids)
    for row, piece in enumerate(pieces):
      count = min(len(piece), self.length)
      ids[row, :count] = piece[:count]
      ids[row, count - 1] = self._end
      mask[row, :count] = 1
    return PromptTokens(ids, mask, tuple(max(0, len(piece) - self.length) for piece in pieces))


def find(path: str | os.PathLike) -> pathlib.Path:
  """The `tokenizer.json` that a path means.

  Raises:
    UserError: there is none, or only SentencePiece's file, which is not read here.
  """
  path = pathlib.Path(path)
  if path.is_file() and path.suffix == ".json":
    return path
  folder = path.parent if path.is_file() else path
  for place in _PLACES:
    if (folder / place / FILE).is_file():
      return folder / place / FILE
  other = next(
    (
      folder / place / "spiece.model"
      for place in _PLACES
      if (folder / place / "spiece.model").is_file()
    ),
    None,
  )
  if other is not None:
    raise UserError(
      f"{other} has no {FILE} beside it, which is what the tokenizer is read from; {_PUBLISHED}, "
      "copy it there"
    )
  raise UserError(f"{path} holds no {FILE}; {_PUBLISHED}")


def _checked(prompt: str) -> str:
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    # bytes of a command line that are not UTF-8 arrive as lone surrogates
    raise UserError(
      f"prompt {prompt[:60]!r} is not valid text ({error.reason}); write it in UTF-8"
    ) from error
  return prompt
