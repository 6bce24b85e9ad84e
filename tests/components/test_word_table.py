"""Words to numbers: padded, cut, unknown words known as such, and the empty prompt nothing at
all.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.components import word_table
from hiar_jax.components.word_table import WordTokenizer

VOCABULARY = ("a", "red", "circle", "moving", "left")


def tokenizer(length: int = 8) -> WordTokenizer:
  return WordTokenizer(VOCABULARY, length)


@pytest.mark.parametrize(
  "prompt, ids",
  [
    ("a red circle", [2, 3, 4, 0, 0, 0, 0, 0]),
    ("A Red, CIRCLE!", [2, 3, 4, 0, 0, 0, 0, 0]),
    ("a  red\tcircle\n", [2, 3, 4, 0, 0, 0, 0, 0]),
    ("a purple circle", [2, 1, 4, 0, 0, 0, 0, 0]),
    ("red_circle", [3, 4, 0, 0, 0, 0, 0, 0]),
    ("", [0] * 8),
    (" ... ", [0] * 8),
    ("a " * 20, [2] * 8),
  ],
)
def test_ids(prompt, ids):
  found = tokenizer()(prompt)
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, ids)


def test_size_counts_padding_and_unknown():
  assert tokenizer().size == len(VOCABULARY) + 2


def test_unknown_words_are_named_once_in_order():
  assert tokenizer().unknown("A PURPLE circle, flying (purple) <pad>") == [
    "purple",
    "flying",
    "pad",
  ]
  assert tokenizer().unknown("a red circle") == []


@pytest.mark.parametrize(
  "prompt, too_many", [("a red", 0), ("a red circle moving", 0), ("a red circle moving left a", 2)]
)
def test_words_that_do_not_fit_are_counted(prompt, too_many):
  assert tokenizer(4).cut_off(prompt) == too_many


@pytest.mark.parametrize("text", ["Ein Kreis, über-Ärger 12x", "x_y z", "naïve Ⅷ ١٢", "日本 語"])
def test_the_vocabulary_of_a_text_knows_all_of_it(text):
  """Both ways to find words agree, whatever the script."""
  made = WordTokenizer(word_table.vocabulary_of([text]), 12)
  assert made.unknown(text) == [] and 1 not in made(text)
  assert np.count_nonzero(made(text)) == len(word_table.split(text))


def test_the_vocabulary_is_sorted_and_without_repeats():
  assert word_table.vocabulary_of(["b a", "A c"]) == ("a", "b", "c")


def test_the_table_is_the_same_every_time():
  one, two = (word_table.word_table(7, 8, 16) for _ in range(2))
  assert one.shape == (15, 16)
  np.testing.assert_array_equal(one, two)
  assert float(one.std()) == pytest.approx(1, abs=0.15)
  assert np.abs(np.asarray(one) - np.asarray(word_table.word_table(7, 8, 16, seed=1))).max() > 0.1


def test_a_word_is_its_vector_plus_its_place_and_padding_is_nothing():
  table = word_table.word_table(7, 4, 16)
  text = word_table.encode(table, jnp.array([[2, 3, 0, 0], [3, 2, 2, 0], [0, 0, 0, 0]]))
  np.testing.assert_allclose(text[0, 0], table[2] + table[7], rtol=1e-6)
  np.testing.assert_allclose(text[1, 2], table[2] + table[9], rtol=1e-6)
  assert not np.asarray(text[0, 2:]).any() and not np.asarray(text[2]).any()
  assert np.abs(np.asarray(text[0, 0] - text[1, 1])).max() > 0.1  # the same word elsewhere
