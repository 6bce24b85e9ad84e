"""A file of videos to make: what it may say, and where it is wrong."""

import json

import pytest

from hiar_jax.errors import UserError
from hiar_jax.generation import prompts_file
from hiar_jax.generation.clips import output_paths


def jobs(tmp_path, content, name="prompts.txt", seed=0):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return prompts_file.read_jobs(path, seed)


def told(found):
  return [(job.prompt, job.seed) for job in found]


def test_one_prompt_a_line_and_seeds_that_count_up(tmp_path):
  found = jobs(tmp_path, "# two\n\n  a cat \n\n\t# none\na dog | and a cat\na cat\n", seed=5)
  assert told(found) == [("a cat", 5), ("a dog | and a cat", 6), ("a cat", 7)]
  assert [job.line for job in found] == [3, 6, 7]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.csv"])
def test_all_formats_say_the_same(tmp_path, name):
  (tmp_path / "my cat.png").write_bytes(b"x")
  (tmp_path / "dog.mp4").write_bytes(b"x")
  rows = [
    {"prompt": "plain"},
    {"prompt": "A cat, still", "seed": 7, "image": "my cat.png", "out": "c/cat 1.mp4"},
    {"prompt": "走る犬", "video": "dog.mp4"},
    {"prompt": "seed=3 is no setting"},
    {"prompt": "", "seed": 0},
  ]
  content = {
    "prompts.txt": "plain\nseed=7 image=\"my cat.png\" out='c/cat 1.mp4' | A cat, "
    "still\nvideo=dog.mp4|走る犬\n"
    'seed=3 is no setting\nseed=0 | ""\n',
    "prompts.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "prompts.csv": 'seed, prompt,image,video,out\n,plain,,,\n7,"A cat, still",my cat.png,,c/cat '
    "1.mp4\n,走る犬,,dog.mp4,\n"
    ',seed=3 is no setting,,,\n0,"""""",,,\n',
  }[name]
  found = jobs(tmp_path, content, name, seed=100)
  assert told(found) == [
    ("plain", 100),
    ("A cat, still", 7),
    ("走る犬", 102),
    ("seed=3 is no setting", 103),
    ("", 0),
  ]
  assert (
    found[1].image == tmp_path / "my cat.png"
    and found[1].out == "c/cat 1.mp4"
    and found[1].video is None
  )
  assert found[2].video == tmp_path / "dog.mp4" and found[2].image is None


@pytest.mark.parametrize(
  "content",
  [
    "a cät\na dog\n".encode("utf-8-sig"),
    "a cät\na dog\n".encode("utf-16"),
    b"\xfe\xff" + "a cät\na dog".encode("utf-16-be"),
    "a cät\r\na dog\r\n".encode(),
    "a cät\ra dog".encode(),
  ],
)
def test_encodings_and_line_ends(tmp_path, content):
  assert told(jobs(tmp_path, content)) == [("a cät", 0), ("a dog", 1)]


def test_a_line_break_of_typesetting_ends_no_prompt(tmp_path):
  assert told(jobs(tmp_path, "a cat\u2028and a dog\x0c\n")) == [("a cat\u2028and a dog", 0)]


def test_a_formula_is_read_at_once(tmp_path):
  formula = "a=" * 50 + " x"
  assert told(jobs(tmp_path, formula)) == [(formula, 0)]


def test_a_prompt_over_several_lines_of_a_csv_file(tmp_path):
  found = jobs(tmp_path, 'prompt,seed\n"a cat\nand a dog",3\nlast,4\n', "p.csv")
  assert told(found) == [("a cat\nand a dog", 3), ("last", 4)] and found[1].line == 4


def test_what_is_asked_for_twice_is_made_once(tmp_path, capsys):
  found = jobs(
    tmp_path, "seed=1 | a cat\na dog\nseed=1|a cat\nseed=2|a cat\nseed=1 out=b.mp4 | a cat\n"
  )
  assert told(found) == [("a cat", 1), ("a dog", 1), ("a cat", 2), ("a cat", 1)]
  assert capsys.readouterr().err.endswith(
    "prompts.txt, line 3: the same prompt and seed as in line 1; made once\n"
  )


WRONG = {
  "latin": ("a.txt", b"a cat\n\nein gr\xf6\xdferer Kreis", "a.txt is not UTF-8 text (line 3: "),
  "binary": ("a.txt", b"a cat\nPK\0\0", "a.txt is not text: line 2 holds a zero byte"),
  "empty": ("a.txt", "# nothing\n\n", "holds no prompt; write one a line"),
  "empty csv": ("a.csv", "", "holds no prompt"),
  "typo": ("a.txt", "ok\nsed=4 | a cat", "line 2: there is no field 'sed'; did you mean 'seed'?"),
  "unknown": (
    "a.jsonl",
    '{"prompt": "a", "colour": 1}',
    "line 1: there is no field 'colour'; there is prompt, seed, ",
  ),
  "twice": ("a.txt", "seed=4 seed=5 | a cat", "line 1: seed is given twice"),
  "prompt before": ("a.txt", "prompt=x | a cat", "line 1: the prompt stands after the |"),
  "no prompt": ("a.txt", "seed=4 | ", 'line 1: there is no prompt; an empty one is written ""'),
  "no prompt csv": ("a.csv", "prompt,seed\na,1\n,2\n", "line 3: there is no prompt"),
  "open quote before": (
    "a.txt",
    'image="a b.png | a',
    "line 1: expected name=value settings before the |, in quotes",
  ),
  "blank in a name": (
    "a.txt",
    "image=a b.png | a",
    "line 1: expected name=value settings before the |, in quotes",
  ),
  "no prompt json": ("a.jsonl", '{"prompt": "a"}\n{"seed": 4}', "line 2: there is no prompt"),
  "word": (
    "a.txt",
    "seed=four | a cat",
    "line 1: seed = 'four': expected a whole number from 0 to 2147483647",
  ),
  "negative": ("a.csv", "prompt,seed\na,1\nb,-1\n", "line 3: seed = '-1': expected"),
  "fraction": ("a.jsonl", '{"prompt": "a", "seed": 1.5}', "line 1: seed = 1.5: expected"),
  "truth": ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed = True: expected"),
  "large": ("a.txt", "seed=2147483648 | a", "line 1: seed = '2147483648': expected"),
  "a picture of a long name": ("a.txt", f"image={'a' * 300} | a", "line 1: image = 'aaaaa"),
  "no picture": ("a.txt", "image=cat.png | a", "line 1: image = 'cat.png': there is no file "),
  "both": (
    "a.txt",
    "image=a.txt video=a.txt | a",
    "line 1: a video starts from an image or from a video",
  ),
  "gif": ("a.txt", "out=a.gif | a", "line 1: out = 'a.gif': expected a name that ends in .mp4"),
  "same name": (
    "a.txt",
    "out=a.mp4 | a\n\nout=a.mp4 | b",
    "line 3: out = 'a.mp4' is the name of another video already, in line 1",
  ),
  "same file": (
    "a.txt",
    "out=v/a.mp4 | a\nout=./v//a.mp4 | b",
    "line 2: out = 'v/a.mp4' is the name of another video already, in line 1",
  ),
  "folder above": ("a.txt", "ok\nout=../a.mp4 | a", "line 2: out = '../a.mp4' leaves the folder"),
  "and back": ("a.txt", "out=x/../a.mp4 | a", "line 1: out = 'x/../a.mp4' leaves the folder"),
  "absolute": ("a.csv", "prompt,out\na,/v/a.mp4\n", "line 2: out = '/v/a.mp4' leaves the folder"),
  "zero byte": (
    "a.jsonl",
    '{"prompt": "a", "out": "a\\u0000.mp4"}',
    r"line 1: out = 'a\x00.mp4' holds a zero byte",
  ),
  "many digits": ("a.txt", f"seed={'9' * 5000} | a", f"line 1: seed = '{'9' * 60}'...: expected"),
  "many digits json": (
    "a.jsonl",
    f'{{"prompt": "a", "seed": {"9" * 5000}}}',
    "line 1: not JSON (Exceeds the limit",
  ),
  "deep": ("a.jsonl", "[" * 100_000, "line 1: not JSON (maximum recursion depth exceeded"),
  "no json": (
    "a.jsonl",
    '{"prompt": "a"}\n{"prompt": ',
    "line 2: not JSON (Expecting value at column",
  ),
  "no object": (
    "a.jsonl",
    '["a"]',
    'line 1: expected an object, as {"prompt": "a cat"}, got \'["a"]\'',
  ),
  "number": ("a.jsonl", '{"prompt": 3}', "line 1: prompt = 3: expected text"),
  "no header": (
    "a.csv",
    "a cat,4\na dog,5\n",
    "line 1: the first line names the columns, one of them prompt; got a cat, 4",
  ),
  "comma": (
    "a.csv",
    "prompt,seed\na cat, a dog,4\n",
    "line 2: more than the 2 columns of the first line; quote",
  ),
  "open quote": ("a.csv", 'prompt,seed\n"a cat,4\n', "not CSV (unexpected end of data)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, case):
  name, content, message = WRONG[case]
  with pytest.raises(UserError) as error:
    jobs(tmp_path, content, name)
  assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_two_names_of_one_file(tmp_path):
  """A folder of --out may be a link to another one."""
  out = tmp_path / "out"
  (out / "a").mkdir(parents=True)
  (out / "b").symlink_to("a")
  found = jobs(tmp_path, "out=a/x.mp4 | a cat\nout=b/x.mp4 | a dog\n")
  with pytest.raises(UserError, match=r"a/x\.mp4 and .*b/x\.mp4 are one file"):
    output_paths(found, str(out), many=True)


def test_no_file(tmp_path):
  with pytest.raises(
    UserError, match="nowhere.txt does not exist; write one prompt a line into it"
  ):
    prompts_file.read_jobs(tmp_path / "nowhere.txt")
