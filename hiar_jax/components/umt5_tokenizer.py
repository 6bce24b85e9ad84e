"""Prompts -> token ids of UMT5, as Wan2.1 feeds them to its text encoder.

Reference: Wan2.1, wan/modules/tokenizers.py with clean="whitespace". The tokenizer itself is data:
`tokenizer.json`, published beside the weights in google/umt5-xxl/.
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
# folders of converted weights, of diffusers' layout and of Wan2.1's own
_PLACES = ("", "tokenizer", "google/umt5-xxl")
_PUBLISHED = "Wan2.1's download has one in google/umt5-xxl/"

# The negative prompt of Wan2.1 (wan/configs/shared_config.py: sample_neg_prompt); Self-Forcing and
# HiAR use it too.
NEGATIVE_PROMPT = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
  "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class PromptTokens(NamedTuple):
  """Tokenised prompts: ids and mask int32 [b l], mask 1 on tokens and 0 on padding; cut: tokens
  that each of the b prompts lost.
  """

  ids: Tokens
  mask: Tokens
  cut: tuple[int, ...]


def clean(prompt: str) -> str:
  """Repairs broken encodings and HTML entities, and makes every run of white space one blank."""
  # unescaped twice, as the reference does: entities of web captions are often escaped themselves
  fixed = html.unescape(html.unescape(ftfy.fix_text(prompt)))
  return " ".join(fixed.split())


class Tokenizer:
  """UMT5's tokenizer.

  path: `tokenizer.json`, or a folder as in `find`. length: tokens, the end mark included.

  Raises:
    UserError: no such file, or the file is not a tokenizer of UMT5's kind.
  """

  def __init__(self, path: str | os.PathLike, length: int = LENGTH):
    at_least(2, length=length)
    self.path = find(path)
    self.length = length
    content = self.path.read_bytes()
    self.fingerprint = hashlib.sha256(content).hexdigest()[:12]
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises no narrower type
      raise UserError(
        f"{self.path} is no tokenizer file ({error}); copy it again, {_PUBLISHED}"
      ) from error
    # The file may set a length and padding of its own; both are done below, to count what is cut.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._end, self._pad = (self._tokenizer.token_to_id(token) for token in (END, PAD))
    if self._end is None or self._pad is None or self._tokenizer.encode("").ids != [self._end]:
      raise UserError(
        f"{self.path} does not close prompts with {END} and fill them up with {PAD}, as UMT5's "
        f"does; {_PUBLISHED}"
      )

  def __call__(self, prompts: Sequence[str]) -> PromptTokens:
    """Cleans and tokenises prompts; one that is too long keeps its beginning and the end mark.

    Raises:
      UserError: a prompt that is not valid Unicode text.
    """
    for prompt in prompts:
      try:
        prompt.encode()
      except UnicodeEncodeError as error:
        # bytes of a command line that are not UTF-8 arrive as lone surrogates
        raise UserError(
          f"prompt {prompt[:60]!r} is not valid text ({error.reason}); write it in UTF-8"
        ) from error
    texts = [clean(prompt) for prompt in prompts]
    encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
    ids = np.full((len(encoded), self.length), self._pad, np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(encoded):
      count = min(len(tokens), self.length)
      ids[row, :count] = tokens[:count]
      ids[row, count - 1] = self._end  # already there, unless the prompt was cut
      mask[row, :count] = 1
    return PromptTokens(ids, mask, tuple(max(0, len(tokens) - self.length) for tokens in encoded))


def find(path: str | os.PathLike) -> pathlib.Path:
  """Returns the `tokenizer.json` at a path, or in the folder of weights that the path names.

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
  for place in _PLACES:
    sentencepiece = folder / place / "spiece.model"
    if sentencepiece.is_file():
      raise UserError(
        f"{sentencepiece} has no {FILE} beside it, which is what the tokenizer is read from; "
        f"{_PUBLISHED}, copy it there"
      )
  raise UserError(f"{path} holds no {FILE}; {_PUBLISHED}")
