"""Captions of a folder of videos, as spreadsheets, scripts and people write them."""

import json

import pytest

from hiar_jax.data.captions import Captions, read_captions
from hiar_jax.errors import UserError
from hiar_jax.video.video_file import Unusable


@pytest.mark.parametrize("apart", ["\n", "\r\n", "\u2028", "\u2029", "\x85", "\v", "\f"])
def test_what_parts_the_lines_of_a_caption_stays_in_it(tmp_path, apart):
  caption = f"A red circle{apart}moving left"
  read = caption.replace("\r\n", "\n")
  quoted = f'file,caption\na.mp4,"{caption}"\nb.mp4,b\n'
  (tmp_path / "metadata.csv").write_bytes(quoted.encode())
  assert read_captions(tmp_path) == {"a.mp4": [read], "b.mp4": ["b"]}
  (tmp_path / "metadata.csv").unlink()
  if apart not in "\r\n\v\f":  # which JSON escapes
    row = json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert read_captions(tmp_path) == {"a.mp4": [caption]}


def test_spreadsheets_save_utf_16_and_blanks(tmp_path):
  (tmp_path / "metadata.csv").write_bytes(
    'file, caption\r\na.mp4, "gr\u00fcn, rund"'.encode("utf-16")
  )
  assert read_captions(tmp_path) == {"a.mp4": ["grün, rund"]}


WRONG = {
  "columns": ("metadata.csv", "video,caption\na.mp4,x\n", "line 1: .*one of them file; got video"),
  "no captions": ("metadata.csv", "file\na.mp4\n", "line 1: .*one of them caption; got file"),
  "twice": ("metadata.csv", "file,caption,caption\n", "line 1: a column is named twice"),
  "comma": (
    "metadata.csv",
    "file,caption\na.mp4,x\nb.mp4,a red circle, moving left\n",
    "line 3: more than the 2 columns of the first line; quote a caption that holds commas",
  ),
  "open quote": (
    "metadata.csv",
    'file,caption\na.mp4,x\nb.mp4,"a red circle\nc.mp4,a blue square\n',
    r"line 3: not CSV \(unexpected end of data\)",
  ),
  "open quote that is closed by another": (
    "metadata.csv",
    'file,caption\na.mp4,"a red circle\nb.mp4,"a blue square"\n',
    "line 2: not CSV",
  ),
  "column": (
    "metadata.jsonl",
    '{"file": "a.mp4", "caption": "x"}\n\n{"file_name": "b.mp4"}\n',
    "line 3: .*found file_name",
  ),
  "list": ("metadata.jsonl", '["a.mp4"]\n', r'line 1: expected an object.*got \'\["a.mp4"\]'),
  "no json": ("metadata.jsonl", "{file: a}\n", "line 1: not JSON"),
  "name twice": ("metadata.jsonl", '{"file": "a", "file": "b"}', "line 1: .*there twice"),
  "captions": (
    "metadata.jsonl",
    '{"file": "a.mp4", "caption": ["x", "y"]}',
    r"line 1: caption = \['x', 'y'\]: expected text",
  ),
  "number": ("metadata.jsonl", '{"file": "a.mp4", "caption": 7.5}', "line 1: caption = 7.5: expec"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_metadata_is_one_clear_line(tmp_path, case):
  name, text, message = WRONG[case]
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    read_captions(tmp_path)
  assert "\n" not in str(error.value)


def test_texts_beside_the_films(tmp_path):
  texts = {"a.TXT": b"capitals", "b.txt": b"small", "b.TXT": b"not this", "c.txt": b"\xff"}
  texts |= {"d.txt": "UTF 16".encode("utf-16"), "e.txt": b" \n"}
  for name, text in texts.items():
    (tmp_path / name).write_bytes(text)
  for name in "abcdef":
    (tmp_path / f"{name}.mp4").touch()
  captions = Captions.read(tmp_path, texts)
  found = [captions.of(f"{name}.mp4") for name in "abd"]
  assert found == [["capitals"], ["small"], ["UTF 16"]]
  reasons = {"c": "c.txt is not UTF-8 text", "e": "no caption in e.txt", "f": "there is no f.txt"}
  for name, reason in reasons.items():
    with pytest.raises(Unusable, match=reason):
      captions.of(f"{name}.mp4")


def test_a_film_may_have_several_captions_and_one_without_any_is_named(tmp_path):
  rows = [("a.mp4", "one"), ("./a.mp4", "two"), ("a.mp4", " one "), ("b.mp4", None), ("b.mp4", "b")]
  text = "\n".join(json.dumps({"file": file, "caption": caption}) for file, caption in rows)
  (tmp_path / "metadata.jsonl").write_text(text + '\n{"file": "c.mp4"}')
  for name in "abc":
    (tmp_path / f"{name}.mp4").touch()
  captions = Captions.read(tmp_path, ())
  assert captions.of("a.mp4") == ["one", "two"] and captions.of("b.mp4") == ["b"]
  with pytest.raises(Unusable, match="no caption in the metadata"):
    captions.of("c.mp4")
