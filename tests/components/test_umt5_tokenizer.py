"""Prompts to tokens: cleaned, closed, cut and filled up as published, in any script; and files that
are none.
"""

import hashlib
import json

import numpy as np
import pytest
import tokenizers

from hiar_jax.components import umt5_tokenizer
from hiar_jax.components.umt5_tokenizer import Tokenizer, clean
from hiar_jax.errors import UserError
from tests.helpers.small_tokenizer import save_small_tokenizer, small_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return save_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
  ("prompt", "cleaned"),
  [
    ("  A cat\n\twalks \u00a0 on\u3000grass  ", "A cat walks on grass"),
    ("salt &amp; pepper", "salt & pepper"),
    ("salt &amp;amp;amp; pepper", "salt & pepper"),  # once by ftfy, twice after it
    ("<i> salt &amp;amp; pepper", "<i> salt & pepper"),  # not by ftfy, which takes it for HTML
    ("schÃ¶ne Wiese", "schöne Wiese"),  # UTF-8 that was read as Latin-1
    ("\u201cquoted\u201d \u2018cat\u2019s\u2019", "\"quoted\" 'cat's'"),
    ("一只猫，在草地上。", "一只猫,在草地上。"),  # full width to half
    ("e\u0301t\u00e9", "été"),
    ("\x1b[31mred\x1b[0m \x00cat\x1f", "red cat"),
    ("👩\u200d🚀 moon", "👩\u200d🚀 moon"),
    (" \n ", ""),
    ("&nbsp;", ""),
  ],
)
def test_cleaning(prompt, cleaned):
  assert clean(prompt) == cleaned
  assert clean(cleaned) == cleaned


PROMPTS = [
  "A cat walks on the grass",
  "一只猫在草地上行走",
  "قطة تمشي على العشب",
  "кошка идёт по траве",
  "🐈 🌊 moon",
  "",
]


def test_every_prompt_is_closed_and_filled_up(path):
  ids, mask, cut = Tokenizer(path, 64)(PROMPTS)
  assert (
    ids.shape == mask.shape == (6, 64) and ids.dtype == mask.dtype == np.int32 and cut == (0,) * 6
  )
  for prompt, row, seen in zip(PROMPTS, ids, mask, strict=True):
    count = seen.sum()
    assert (seen == (np.arange(64) < count)).all()
    assert row[count - 1] == 1 and (row[:count] != 0).all() and (row[count:] == 0).all()
    # nothing unknown, nothing lost
    assert 2 not in row[:count] and small_tokenizer().decode(row[:count]) == prompt
  assert list(ids[5, :2]) == [1, 0]  # an empty prompt is its end mark


def test_prompts_are_cleaned_first(path):
  both = Tokenizer(path)(["A cat  walks\n", "A cat walks"]).ids
  assert both.shape == (2, 512)
  np.testing.assert_array_equal(both[0], both[1])


def test_a_prompt_that_is_too_long_keeps_its_beginning_and_the_end_mark(path):
  whole = Tokenizer(path, 64)(PROMPTS[:1])
  count = int(whole.mask.sum())
  for length in (count + 1, count, count - 1, count - 3, 2):
    ids, mask, (cut,) = Tokenizer(path, length)(PROMPTS[:1])
    assert cut == max(0, count - length)
    kept = min(count, length)
    assert mask.sum() == kept and ids[0, kept - 1] == 1
    np.testing.assert_array_equal(ids[0, : kept - 1], whole.ids[0, : kept - 1])


def test_what_the_file_says_of_length_does_not_count(path, tmp_path):
  asking = tokenizers.Tokenizer.from_file(str(path))
  asking.enable_truncation(4)
  asking.enable_padding(length=100, pad_id=0, pad_token="<pad>", direction="left")
  asking.save(str(tmp_path / "tokenizer.json"))
  np.testing.assert_array_equal(
    Tokenizer(tmp_path, 32)(PROMPTS).ids, Tokenizer(path, 32)(PROMPTS).ids
  )


@pytest.mark.parametrize("place", ["", "tokenizer", "google/umt5-xxl"])
def test_where_the_file_is_found(place, tmp_path):
  written = save_small_tokenizer(tmp_path / place)
  assert umt5_tokenizer.find(tmp_path) == umt5_tokenizer.find(written) == written
  (written.parent / "spiece.model").write_bytes(b"")
  assert umt5_tokenizer.find(written.parent / "spiece.model") == written


def test_the_fingerprint_is_that_of_the_content(path, tmp_path):
  same, other = tmp_path / "same.json", tmp_path / "other.json"
  same.write_bytes(path.read_bytes())
  other.write_bytes(path.read_bytes() + b"\n")
  assert Tokenizer(path).fingerprint == Tokenizer(same).fingerprint != Tokenizer(other).fingerprint


def test_the_negative_prompt_is_the_published_one():
  assert len(umt5_tokenizer.NEGATIVE_PROMPT) == 137
  digest = hashlib.sha256(umt5_tokenizer.NEGATIVE_PROMPT.encode()).hexdigest()
  assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def _says(words, function, *args):
  with pytest.raises(UserError) as error:
    function(*args)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(path, tmp_path):
  _says("holds no tokenizer.json", Tokenizer, tmp_path)
  (tmp_path / "google/umt5-xxl").mkdir(parents=True)
  (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(b"\n\x0e")
  _says("umt5-xxl/spiece.model has no tokenizer.json beside it", Tokenizer, tmp_path)
  for content in (b"", b"\xff\xfe", b"{}", path.read_bytes()[:1000]):
    (tmp_path / "tokenizer.json").write_bytes(content)
    _says("is no tokenizer file", Tokenizer, tmp_path)


@pytest.mark.parametrize("change", [{"post_processor": None}, {"added_tokens": []}])
def test_tokenizers_of_another_kind(change, path, tmp_path):
  content = json.loads(path.read_text())
  if "added_tokens" in change:
    content["model"]["vocab"] = [
      [token.strip("<>/"), score] for token, score in content["model"]["vocab"]
    ]
    content["post_processor"] = None
  (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
  _says("does not close prompts with </s>", Tokenizer, tmp_path)


def test_other_bad_input(path):
  _says("not valid text", Tokenizer(path), ["fine", "caf\udce9"])
  _says("length = 1", Tokenizer, path, 1)
