"""A file of prompts, one per video, with optional seed, image or video to start from, output name,
and for packed models an image or video to end with, a timeline and takes (generation.sections).

    prompts.txt     A cat walks on grass
                    # a comment
                    seed=7 image=cat.png out=cat.mp4 | The same cat, from a picture
    prompts.jsonl   {"prompt": "A cat walks on grass", "seed": 7, "image": "cat.png"}
    prompts.csv     prompt,seed,video
                    "A cat, then a dog",7,cat.mp4

In .txt, settings stand before a ` | `, quoted where they hold spaces (image="my cat.png"); a line
without settings is a prompt as it stands. A row without a seed takes the command's seed plus its
index in the file, counted from 0. Relative paths start at the folder of the file.
"""

from collections.abc import Iterator, Mapping, Sequence
import csv
import dataclasses
import difflib
import io
import json
import numbers
import os
import pathlib
import re
import sys

from hiar_jax.errors import MAX_NOISE_SEED, UserError
from hiar_jax.generation import timeline as timelines
from hiar_jax.generation.sections import Takes, read_takes
from hiar_jax.generation.timeline import Timeline

FIELDS = ("prompt", "seed", "image", "video", "out", "end_image", "end_video", "timeline", "takes")
# what only a packed model does (generation.sections)
TOLD = ("end_image", "end_video", "loop", "order", "timeline", "takes")
MAX_SEED = MAX_NOISE_SEED

_SETTING = r"(\w+)=(\"[^\"]*\"|'[^']*'|[^\s|\"']*)"  # name=value, name="value" or name='value'
_SETTINGS = re.compile(rf"\s*(?:{_SETTING}(?:\s+|(?=\|)))+\|")
# Settings of known names that _SETTINGS does not accept: an error, not the words of a prompt.
_BROKEN = re.compile(rf"\s*(?:{'|'.join(FIELDS)})=[^|]*\|")
_EMPTY = '""'  # a prompt without words; nothing at all would read as a missing prompt
# byte order marks; Windows' editors save text as UTF-16
_BYTE_ORDER = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One video to generate.

  image, video: the file that it continues, at most one of them. out: the name of its file, None for
  one made of the prompt. line: line number in the prompts file, 0 without one. end_image,
  end_video: the file that it ends with, at most one. loop: it comes back to its start. order: of
  its sections, '' for the model's. timeline: prompts of its sections. takes: their other seeds.
  """

  prompt: str
  seed: int
  image: pathlib.Path | None = None
  video: pathlib.Path | None = None
  out: str | None = None
  line: int = 0
  end_image: pathlib.Path | None = None
  end_video: pathlib.Path | None = None
  loop: bool = False
  order: str = ""
  timeline: Timeline | None = None
  takes: Takes = ()

  @property
  def told(self) -> list[str]:
    """The names of the options in use that only a packed model has."""
    return [name for name in TOLD if getattr(self, name)]

  @property
  def title(self) -> str:
    """The prompt, or the first of the timeline, to name a file after."""
    return self.prompt or (self.timeline.entries[0].prompt if self.timeline else "")


def make_jobs(
  prompts: Sequence[str],
  seeds: int | Sequence[int] = 0,
  image: str | os.PathLike | None = None,
  video: str | os.PathLike | None = None,
  *,
  end_image: str | os.PathLike | None = None,
  end_video: str | os.PathLike | None = None,
  loop: bool = False,
  order: str | None = None,
  timeline: str | os.PathLike | None = None,
  takes: str | Mapping[int, int] | None = None,
) -> list[Job]:
  """Returns one job per prompt, all with the same start and end, timeline and takes.

  seeds: one per prompt, or that of the first; the next ones count up. timeline: a text or a file
  (generation.timeline). takes: {section: seed}, or a text.

  Raises UserError for prompts that are no texts, seeds that are out of range or of another number,
  two starts or ends, and a timeline or takes that cannot be read.
  """
  for prompt in prompts:
    if not isinstance(prompt, str):
      raise UserError(f"prompt = {prompt!r}: expected text")
  if image and video:
    raise UserError("give either --image or --video: a video starts from one of them")
  if len([end for end in (end_image, end_video, loop) if end]) > 1:
    raise UserError("give one of --end_image, --end_video and --loop: a video has one end")
  if isinstance(seeds, Sequence) and not isinstance(seeds, str):
    if len(seeds) != len(prompts):
      raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or one seed")
  else:
    check_seed(seeds)
    seeds = range(seeds, seeds + len(prompts))
  files = dict(image=image, video=video, end_image=end_image, end_video=end_video)
  files = {name: path and pathlib.Path(path) for name, path in files.items()}
  read = None if timeline is None else timelines.read(timeline)
  told = dict(loop=loop, order=order or "", timeline=read, takes=read_takes(takes, check_seed))
  return [
    Job(prompt, check_seed(seed), **files, **told)
    for prompt, seed in zip(prompts, seeds, strict=True)
  ]


def check_seed(seed: int) -> int:
  """Returns the seed. Raises UserError unless it is a whole number from 0 to MAX_SEED."""
  # True is an int of Python; NumPy's whole numbers are Integral too
  whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
  if not whole or not 0 <= seed <= MAX_SEED:
    raise UserError(f"seed = {seed!r}: expected a whole number from 0 to {MAX_SEED}")
  return int(seed)


def read_jobs(path: str | os.PathLike, seed: int = 0) -> list[Job]:
  """Reads the jobs of a .txt, .jsonl or .csv file (another ending is read as .txt), in its order.

  Repeated rows are left out, with a message on stderr. Raises UserError, with file and line, for a
  missing file or image, no prompt, text that is neither UTF-8 nor UTF-16, a broken row, an unknown
  field, a bad seed, or two different videos of one output name.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"prompts file {path} does not exist; write one prompt a line into it")
  rows = {".jsonl": _json_rows, ".csv": _csv_rows}.get(path.suffix.lower(), _text_rows)
  jobs = [_job(row, path, line, seed + i) for i, (line, row) in enumerate(rows(_text(path), path))]
  if not jobs:
    raise UserError(f"prompts file {path} holds no prompt; write one a line (# starts a comment)")
  return _distinct(jobs, path)


def _text(path: pathlib.Path) -> io.StringIO:
  """The file as text with universal newlines."""
  content = path.read_bytes()
  encoding = _BYTE_ORDER.get(content[:2], "utf-8-sig")  # -sig: drops a UTF-8 byte order mark
  try:
    text = content.decode(encoding)
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise UserError(
      f"prompts file {path} is not UTF-8 text (line {line}: {error.reason}); save it as UTF-8"
    ) from error
  # zero bytes are valid UTF-8, but mean a binary file
  if "\0" in text:
    line = text.count("\n", 0, text.index("\0")) + 1
    raise UserError(f"prompts file {path} is not text: line {line} holds a zero byte")
  return io.StringIO(text, newline=None)


# A reader of rows yields (line number, {field: value}), prompt None where the row has none.


def _text_rows(text: io.StringIO, path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  for number, line in enumerate(text, 1):
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    match = _SETTINGS.match(line)
    if not match and _BROKEN.match(line):
      raise _wrong(
        path, number, "expected name=value settings before the |, in quotes where they hold spaces"
      )
    # a repeated group keeps its last match alone, so the settings are found again one by one
    row = {}
    for name, value in re.findall(_SETTING, match[0]) if match else ():
      if name in row:
        raise _wrong(path, number, f"{name} is given twice")
      row[name] = value.strip("\"'")
    if "prompt" in row:
      raise _wrong(path, number, "the prompt stands after the |, not before it")
    yield number, {**row, "prompt": _unquote_empty(line[match.end() :] if match else line)}


def _json_rows(text: io.StringIO, path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  for number, line in enumerate(text, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise _wrong(
        path, number, f"not JSON ({error.msg} at column {error.colno}); write one object a line"
      ) from error
    if not isinstance(row, dict):
      raise _wrong(
        path, number, f'expected an object, as {{"prompt": "a cat"}}, got {line.strip()[:40]!r}'
      )
    yield number, row


def _csv_rows(text: io.StringIO, path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  reader = csv.DictReader(text, strict=True, skipinitialspace=True)
  try:
    names = [name.strip() for name in reader.fieldnames or ()]
    if names and "prompt" not in names:
      raise _wrong(
        path, 1, f"the first line names the columns, one of them prompt; got {', '.join(names)}"
      )
    reader.fieldnames = names
    for row in reader:
      # DictReader collects what stands beyond the named columns under None
      if row.pop(None, None) is not None:
        raise _wrong(
          path,
          reader.line_num,
          f"more than the {len(names)} columns of the first line; quote a prompt that holds commas",
        )
      yield reader.line_num, {**row, "prompt": _unquote_empty(row["prompt"])}
  except csv.Error as error:
    raise _wrong(path, reader.line_num, f"not CSV ({error})") from error


def _job(row: dict, path: pathlib.Path, line: int, seed: int) -> Job:
  """Checks a row. seed: that of a row without one."""
  for name in row:
    if name not in FIELDS:
      close = difflib.get_close_matches(str(name), FIELDS, n=1)
      raise _wrong(
        path,
        line,
        f"there is no field {name!r}; "
        f"{f'did you mean {close[0]!r}?' if close else 'there is ' + ', '.join(FIELDS)}",
      )
  given = {name: _string(name, value, path, line) for name, value in row.items() if name != "seed"}
  if given.get("prompt") is None:
    raise _wrong(path, line, f"there is no prompt; an empty one is written {_EMPTY}")
  names = ("image", "video", "end_image", "end_video")
  files = {name: _picture(name, given.get(name), path, line) for name in names}
  if files["image"] and files["video"]:
    raise _wrong(path, line, "a video starts from an image or from a video, not from both")
  if files["end_image"] and files["end_video"]:
    raise _wrong(path, line, "a video ends with an image or with a video, not with both")
  out = given.get("out") or None
  if out and not out.endswith(".mp4"):
    raise _wrong(path, line, f"out = {out!r}: expected a name that ends in .mp4")
  timeline = given.get("timeline")
  try:
    timeline = timelines.read(timeline, path.parent) if timeline else None
    takes = read_takes(given.get("takes"), check_seed)
  except UserError as error:
    raise _wrong(path, line, str(error)) from error
  seed = _seed(row.get("seed"), seed, path, line)
  told = dict(timeline=timeline, takes=takes)
  return Job(given["prompt"], seed, out=out, line=line, **files, **told)


def _unquote_empty(prompt: str | None) -> str | None:
  """A prompt of .txt or .csv: '""' is the empty one, nothing is None."""
  prompt = (prompt or "").strip()
  return "" if prompt == _EMPTY else prompt or None


def _string(name: str, value, path: pathlib.Path, line: int) -> str | None:
  if value is not None and not isinstance(value, str):
    raise _wrong(path, line, f"{name} = {value!r}: expected text")
  return value and value.strip()


def _seed(value, default: int, path: pathlib.Path, line: int) -> int:
  if value is None or (isinstance(value, str) and not value.strip()):
    value = default
  # JSON's true is an int of Python, and int() would take "1_0" and digits of other scripts
  number = value if isinstance(value, int) and not isinstance(value, bool) else None
  if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value, re.ASCII):
    number = int(value)
  if number is None or not 0 <= number <= MAX_SEED:
    raise _wrong(path, line, f"seed = {value!r}: expected a whole number from 0 to {MAX_SEED}")
  return number


def _picture(name: str, value: str | None, path: pathlib.Path, line: int) -> pathlib.Path | None:
  if not value:
    return None
  picture = path.parent / pathlib.Path(value).expanduser()
  if not picture.is_file():
    raise _wrong(path, line, f"{name} = {value!r}: there is no file {picture}")
  return picture


def _distinct(jobs: list[Job], path: pathlib.Path) -> list[Job]:
  """Drops repeated jobs. Raises UserError for different videos of one output name."""
  # A repetition has the same seed too: rows without a seed have different ones.
  first: dict[Job, Job] = {}
  named: dict[str, Job] = {}
  for job in jobs:
    content = dataclasses.replace(job, line=0)
    same = first.get(content)
    if same:
      print(
        f"{path}, line {job.line}: the same prompt and seed as in line {same.line}; made once",
        file=sys.stderr,
      )
      continue
    if job.out in named:
      raise _wrong(
        path,
        job.line,
        f"out = {job.out!r} is the name of another video already, in line {named[job.out].line}",
      )
    if job.out:
      named[job.out] = job
    first[content] = job
  return list(first.values())


def _wrong(path: pathlib.Path, line: int, message: str) -> UserError:
  return UserError(f"prompts file {path}, line {line}: {message}")
