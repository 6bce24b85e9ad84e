"""Words to numbers: padded, cut, unknown words known as such, and the empty prompt nothing at
all.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.components import word_table
from hiar_jax.components.word_table import WordTable
from hiar_jax.data.prompt_texts import tokens_of

VOCABULARY = ("a", "red", "circle", "moving", "left")


def encoder(length: int = 8, vocabulary=VOCABULARY) -> WordTable:
  return WordTable(vocabulary, length, 16)


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
  found = encoder().tokens([prompt])[0]
  assert found.dtype == np.int32
  np.testing.assert_array_equal(found, ids)


def test_ids_leave_room_for_padding_and_unknown():
  assert sorted(encoder().ids.values()) == list(range(len(VOCABULARY) + 2))


def test_unknown_words_are_named_once_in_order():
  (warning,) = encoder().warnings("A PURPLE circle, flying (purple) <pad>")
  assert "does not know 'purple', 'flying', 'pad'; it is made without" in warning
  assert encoder().warnings("a red circle") == []


@pytest.mark.parametrize(
  "prompt, too_many", [("a red", 0), ("a red circle moving", 0), ("a red circle moving left a", 2)]
)
def test_words_that_do_not_fit_are_counted(prompt, too_many):
  warnings = encoder(4).warnings(prompt)
  assert len(warnings) == (too_many > 0)
  assert all(f"reads 4 words; the last {too_many} are left out" in line for line in warnings)


@pytest.mark.parametrize("text", ["Ein Kreis, über-Ärger 12x", "x_y z", "naïve Ⅷ ١٢", "日本 語"])
def test_the_vocabulary_of_a_text_knows_all_of_it(text):
  """Both ways to find words agree, whatever the script."""
  made = encoder(12, word_table.vocabulary_of([text]))
  assert made.warnings(text) == [] and 1 not in made.tokens([text])
  assert len(made.rows(text)) == len(word_table.split(text))


@pytest.mark.parametrize(
  "text, words",
  [
    ("ΜΑΥΡΟΣ μαυρος, ΚύκλοΣ", ["μαυροσ", "μαυροσ", "κύκλοσ"]),
    (
      "gru\u0308ner gr\u00fcner \uff27\uff52\u00fc\uff4e",
      ["gr\u00fcner", "gr\u00fcner", "gr\u00fcn"],
    ),
    ("एक लाल गोला", ["एक", "लाल", "गोला"]),
    ("红色圆圈 red圈3x", ["红", "色", "圆", "圈", "red", "圈", "3x"]),
    ("สีแดง", ["สี", "แ", "ด", "ง"]),
    ("한국어 공", ["한국어", "공"]),
    ("می\u200cخواهم", ["می\u200cخواهم"]),
    ("🔴⬅️ \ud83d", []),
    ("Straße", ["straße"]),  # as runs that know it have it
  ],
)
def test_words_of_any_script(text, words):
  assert word_table.split(text) == words
  assert word_table.split(" ".join(words)) == words


def test_words_of_plain_captions_are_what_they_were():
  """Runs from before their words were kept with the data read them again."""
  text = "".join(map(chr, range(128))) + " A Red_circle, don't x2 Größe naïve Чёрный"
  assert word_table.split(text) == re.findall(r"[^\W_]+", text.lower())


def test_stored_words_of_an_older_split_keep_their_ids():
  made = encoder(4, ("μαυρος", "a"))
  np.testing.assert_array_equal(made.tokens(["A ΜΑΥΡΟΣ"])[0], [3, 2, 0, 0])


def test_a_prompt_of_signs_is_said_to_hold_no_word():
  (warning,) = encoder().warnings("🔴⬅️")
  assert warning == "prompt '🔴⬅️': holds no word; it is read as the empty prompt"
  assert encoder().warnings("") == [] == encoder().warnings("  ")


def test_what_is_said_of_a_long_prompt_is_short():
  cut, unknown = encoder().warnings(" ".join(f"word{i}" for i in range(10_000)))
  assert len(cut) < 200 and len(unknown) < 300 and "'word7' and 9992 more" in unknown


def test_words_are_kept_with_the_data(tmp_path):
  """In the order of their ids, whatever the data says later; before that the data is asked."""
  config = word_table.WordTableConfig(length=4)
  asked = config.open(tmp_path, lambda: ("from", "data"))
  assert asked.vocabulary == ("from", "data")
  config.fit(tmp_path, ("über", "a"))
  config.fit(tmp_path, ("other", "words"))
  stored = config.open(tmp_path, lambda: pytest.fail("the data was asked"))
  assert stored.vocabulary == ("über", "a") and list(stored.rows("a über")) == [3, 2]


def test_a_record_may_hold_its_ids():
  made = encoder(4)
  stored = {"text": made.rows("a red"), "caption": b"left"}
  np.testing.assert_array_equal(tokens_of(stored, made, 4), [2, 3, 0, 0])
  np.testing.assert_array_equal(tokens_of({"caption": b"left"}, made, 4), [6, 0, 0, 0])


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
