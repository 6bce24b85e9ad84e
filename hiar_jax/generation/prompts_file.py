"""A file of prompts (data.prompt_rows), a video each: with optional seed, image or video to start
from, output name, and for packed models an image or video to end with, a timeline and takes
(generation.sections).

A row without a seed takes the command's seed plus its index in the file, counted from 0. Relative
paths start at the folder of the file.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import numbers
import os
import pathlib
import posixpath
import re
import sys

from hiar_jax.data.list_file import ListFile
from hiar_jax.data.prompt_rows import read_rows
from hiar_jax.errors import MAX_NOISE_SEED, UserError
from hiar_jax.files import is_whole
from hiar_jax.generation import timeline as timelines
from hiar_jax.generation.sections import Takes, read_takes
from hiar_jax.generation.timeline import Timeline

# what only a packed model does (generation.sections)
TOLD = ("end_image", "end_video", "loop", "order", "timeline", "takes")
MAX_SEED = MAX_NOISE_SEED


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
    check_prompt(prompt)
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


def check_prompt(prompt: str) -> None:
  """Raises UserError for what is no text, or none that UTF-8 holds."""
  if not isinstance(prompt, str):
    raise UserError(f"prompt = {prompt!r}: expected text")
  if not is_whole(prompt):
    raise UserError(
      f"prompt = {prompt[:60]!r} holds half a character, or a byte that is not UTF-8; give it as "
      "UTF-8 text"
    )


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
  file, rows = read_rows(path)
  return _distinct([_job(row, file, line, seed + i) for i, (line, row) in enumerate(rows)], file)


def _job(row: dict, file: ListFile, line: int, seed: int) -> Job:
  """Makes the job of a row. seed: that of a row without one."""
  names = ("image", "video", "end_image", "end_video")
  files = {name: _picture(name, row.get(name), file, line) for name in names}
  if files["image"] and files["video"]:
    raise file.wrong(line, "a video starts from an image or from a video, not from both")
  if files["end_image"] and files["end_video"]:
    raise file.wrong(line, "a video ends with an image or with a video, not with both")
  out = _out(row.get("out"), file, line)
  timeline = row.get("timeline")
  try:
    timeline = timelines.read(timeline, file.path.parent) if timeline else None
    takes = read_takes(row.get("takes"), check_seed)
  except UserError as error:
    raise file.wrong(line, str(error)) from error
  seed = _seed(row.get("seed"), seed, file, line)
  told = dict(timeline=timeline, takes=takes)
  return Job(row["prompt"], seed, out=out, line=line, **files, **told)


def _out(out: str | None, file: ListFile, line: int) -> str | None:
  """Returns the name of a row's video, without parts that mean nothing (./a.mp4)."""
  if not out:
    return None
  if not out.endswith(".mp4"):
    raise file.wrong(line, f"out = {out!r}: expected a name that ends in .mp4")
  if "\0" in out:
    raise file.wrong(line, f"out = {out!r} holds a zero byte, which no file name may")
  # A list may come from somebody else: what it names stays where the command's --out says.
  if out.startswith("/") or ".." in out.split("/"):
    raise file.wrong(line, f"out = {out!r} leaves the folder of --out; give a name inside of it")
  return posixpath.normpath(out)


def _seed(value, default: int, file: ListFile, line: int) -> int:
  if value is None or (isinstance(value, str) and not value.strip()):
    value = default
  # JSON's true is an int of Python, and int() would take "1_0" and digits of other scripts
  number = value if isinstance(value, int) and not isinstance(value, bool) else None
  # int() refuses a text of thousands of digits
  if isinstance(value, str) and re.fullmatch(r"\s*\d{1,20}\s*", value, re.ASCII):
    number = int(value)
  if number is None or not 0 <= number <= MAX_SEED:
    given = repr(value) if len(str(value)) <= 60 else f"{str(value)[:60]!r}..."
    raise file.wrong(line, f"seed = {given}: expected a whole number from 0 to {MAX_SEED}")
  return number


def _picture(name: str, value: str | None, file: ListFile, line: int) -> pathlib.Path | None:
  if not value:
    return None
  picture = file.path.parent / pathlib.Path(value).expanduser()
  if not os.path.isfile(picture):
    raise file.wrong(line, f"{name} = {value!r}: there is no file {picture}")
  return picture


def _distinct(jobs: list[Job], file: ListFile) -> list[Job]:
  """Drops repeated jobs. Raises UserError for different videos of one output name."""
  # A repetition has the same seed too: rows without a seed have different ones.
  first: dict[Job, Job] = {}
  named: dict[str, Job] = {}
  for job in jobs:
    content = dataclasses.replace(job, line=0)
    same = first.get(content)
    if same:
      print(
        f"{file.path}, line {job.line}: the same prompt and seed as in line {same.line}; made once",
        file=sys.stderr,
      )
      continue
    if job.out in named:
      raise file.wrong(
        job.line,
        f"out = {job.out!r} is the name of another video already, in line {named[job.out].line}",
      )
    if job.out:
      named[job.out] = job
    first[content] = job
  return list(first.values())
