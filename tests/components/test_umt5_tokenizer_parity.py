"""The published way to tokens (Wan2.1: ftfy, html, regex, transformers' AutoTokenizer) on a small
tokenizer.

Needs the extra `[parity]` (transformers, which brings regex).
"""

import html
import json
import sys

import ftfy
import numpy as np
import pytest

from hiar_jax.components.umt5_tokenizer import NEGATIVE_PROMPT, Tokenizer, clean
from tests.helpers.small_tokenizer import CORPUS, save_small_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

PROMPTS = [
  *CORPUS,
  NEGATIVE_PROMPT,
  "",
  "   ",
  "&lt;b&gt;bold&lt;/b&gt; &amp;amp; more",
  "schÃ¶n \u201ccurly\u201d",
  "ﬁne ＡＢＣ，１２",
  "zero\u200bwidth \ufeffmark",
  "unknown: ᚠᚢᚦ 𓀀",
  "word " * 600,
  "</s> <pad> in the text </s>",
  "tabs\tand\r\nlines\x0b\x0cend",
]


def _published_clean(text):
  import regex

  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return regex.sub(r"\s+", " ", text).strip()


@pytest.mark.slow
def test_cleaning_of_every_character():
  """In the middle, at the ends, and written as an HTML entity."""
  different = []
  for code in range(sys.maxunicode + 1):
    # surrogates are no text; of the long ranges, a sample
    if 0xD800 <= code < 0xE000 or (0x3100 <= code and code % 97):
      continue
    for text in (f"{chr(code)}a{chr(code)}b{chr(code)}", f"&amp;#{code};a&#{code};"):
      if clean(text) != _published_clean(text):
        different.append((code, text))
  assert not different


@pytest.mark.parametrize("length", [16, 512])
def test_ids_and_masks(length, tmp_path):
  import transformers

  path = save_small_tokenizer(tmp_path)
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  options = dict(
    padding="max_length",
    truncation=True,
    max_length=length,
    add_special_tokens=True,
    return_tensors="np",
  )
  expected = peer([_published_clean(prompt) for prompt in PROMPTS], **options)
  tokens = Tokenizer(path, length)(PROMPTS)
  np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
  np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
  assert any(tokens.cut) and not all(tokens.cut)
