"""A file of prompts is the same prompts to training as to generation."""

import pytest

from hiar_jax.data import prompt_rows
from hiar_jax.errors import UserError
from hiar_jax.generation import prompts_file

FILES = {
  "settings.txt": (
    "A cat walks\nseed=7 image=cat.png out=dog.mp4 | A dog runs\n",
    ["A cat walks", "A dog runs"],
  ),
  "rows.jsonl": ('{"prompt": "A cat", "seed": 3}\n\n{"prompt": ""}\n', ["A cat", ""]),
  "rows.csv": ('prompt,seed\n"A cat, then\na dog",7\n"""""",\n', ["A cat, then\na dog", ""]),
  "empty.txt": ('""\n# a comment\n', [""]),
  "separator.txt": ("A cat\u2028walks\x85on\x0bgrass\n", ["A cat\u2028walks\x85on\x0bgrass"]),
  "again.txt": ("a cat\na cat\n", ["a cat", "a cat"]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FILES)
def test_training_reads_what_generation_reads(tmp_path, name, encoding):
  text, prompts = FILES[name]
  (tmp_path / "cat.png").touch()
  (tmp_path / name).write_bytes(text.encode(encoding))
  assert prompt_rows.read_prompts(tmp_path / name) == prompts
  assert [job.prompt for job in prompts_file.read_jobs(tmp_path / name)] == prompts


def test_settings_that_training_leaves_out_are_said(tmp_path, capsys):
  path = tmp_path / "p.csv"
  path.write_text("prompt,seed,image,out\na,,there/is/none.png,\nb,0,,\n")
  assert prompt_rows.read_prompts(path, say=True) == ["a", "b"]  # and asks for no picture
  assert capsys.readouterr().err == f"{path}: read for its prompts alone, without seed, image\n"
  path.write_text("prompt,seed\na,\n")
  prompt_rows.read_prompts(path, say=True)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("p.txt", None, "does not exist"),
    ("p.txt", b"", "holds no prompt"),
    ("p.txt", b"# nothing\n\n", "holds no prompt"),
    ("p.txt", b"\xff\xfe\x00", "UTF-8"),
    ("p.txt", b"sed=4 | a cat", "line 1: there is no field 'sed'; did you mean 'seed'"),
    ("p.json", b'[{"prompt": "a"}]', "expected .jsonl, one object a line, .csv or .txt"),
    ("p.jsonl", b'{"prompt": "a \\ud83d"}', r"line 1: prompt = 'a \\ud83d' holds half a character"),
    ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: .*there twice"),
  ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    prompt_rows.read_prompts(tmp_path / name)
  assert "\n" not in str(error.value)
