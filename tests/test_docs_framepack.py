"""docs/framepack.md tells the truth: its commands are accepted by models of its experiments, and
run; its drawings are those of the orders.
"""

import re
import shlex

import numpy as np
from PIL import Image
import pytest

from hiar_jax import generate, stream
from hiar_jax.errors import UserError
from hiar_jax.generation import clips
from hiar_jax.rollout.packed_past import slots
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.video.lengths import fit_blocks
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.untrained import compiles_quickly, saved_run, untrained  # noqa: F401
from tests.helpers.video_reader import read_mp4
from tests.packing.test_given_frames import BACKWARDS, FILLING, FORWARDS, drawn

PAGE = (tiny_run.ROOT / "docs" / "framepack.md").read_text()
RUNS = {"framepack": "", "both_ends": "_both_ends", "inverted": "_inverted"}


def config(name: str):
  """Of an experiment of the page, with its own sections, of a network that is small."""
  name = f"shapes_framepack{RUNS[name]}"
  full = tiny_packed.load(name)
  sections = {
    "data.frames": full.data.frames,
    "history.block": full.history.block,
    "framepack.packing": full.framepack.packing,
    "teacher.frames": 9,
  }
  return tiny_packed.make_config(name, **sections)


def blocks(kind: str) -> list[str]:
  return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def commands(module: str = "generate") -> list[str]:
  lines = [line for block in blocks("bash") for line in block.splitlines()]
  of = [line for line in lines if line.startswith(f"python -m hiar_jax.{module} ")]
  assert len(lines) == sum(line.startswith("python -m hiar_jax.") for line in lines)
  return of


def flags(command: str, module: str) -> dict[str, str | bool]:
  python, _, name, *given = shlex.split(command)
  assert (python, name) == ("python", f"hiar_jax.{module}")
  values = dict(flag.removeprefix("--").partition("=")[::2] for flag in given)
  return {name: value or True for name, value in values.items()}


def options(command: str, **changes) -> generate.GenerateOptions:
  values = flags(command, "generate")
  whole = {name: int(values[name]) for name in ("frames", "seed") if name in values}
  return generate.GenerateOptions(**{**values, **whole, **changes})


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The files that the commands name, in the directory that they run in."""
  monkeypatch.chdir(tmp_path)
  for name in ("first", "last"):
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(f"{name}.png")
  write_mp4(tmp_path / "clip.mp4", np.full((20, 16, 16, 3), 90, np.uint8), 8)
  (listed,) = [text for text in blocks("text") if text.startswith("end_image")]
  (tmp_path / "list.txt").write_text(listed)
  return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return {name: untrained(tmp_path_factory.mktemp(name), config(name)) for name in RUNS}


@pytest.mark.parametrize("command", commands(), ids=lambda c: shlex.split(c)[-1])
def test_a_command_is_one_that_its_model_takes(command, place, models, capfd):
  """To the frame: none is rounded."""
  wanted = options(command)
  model = models[wanted.workdir.removeprefix("runs/")]
  jobs = generate.read_jobs(wanted)
  planned = clips.plan_clips(model, jobs, [None] * len(jobs), wanted.frames, strict=True)
  assert {clip.pixel_frames(model.experiment) for clip in planned} == {wanted.frames}
  told = {name for clip in planned for name in clip.job.told}
  assert told == {
    name
    for name in ("end_image", "end_video", "loop", "order", "timeline", "takes")
    if getattr(wanted, name) or wanted.prompts and name in ("end_image", "timeline", "takes")
  }


def test_a_stream_is_one_that_its_model_takes(place, models):
  """To the frame, after the frames that it starts from."""
  for command in commands("stream"):
    values = flags(command, "stream")
    wanted = stream.read_options({n: x for n, x in values.items() if n not in ("out", "save")})
    model = models[wanted.workdir.removeprefix("runs/")]
    given = 1 if "on.mp4" in command else 0  # from first.png
    StreamingModel(model, wanted.engine).check(given)
    e = model.experiment
    frames, message = fit_blocks(wanted.length, e.history.block, e.codec.pixel_frames, given=given)
    assert frames == wanted.length - given and message == ""
  for name in set(RUNS) - {"framepack"}:
    with pytest.raises(UserError, match="cannot be streamed; .* --partial"):
      StreamingModel(models[name]).check()


def test_the_schedule_keeps_what_the_page_says(models):
  (said,) = re.findall(r"the last (\d+) frames here", PAGE)
  assert slots(models["framepack"].experiment.framepack.parsed) == (0, 0, int(said))


def test_the_table_says_who_can(place, models):
  """The other runs refuse what the table does not grant them."""
  can = {"end_image": {"both_ends", "inverted"}, "loop": {"both_ends", "inverted"}}
  start = {"inverted": ["--image=first.png"]}
  for name, model in models.items():
    for what, flag in (("end_image", "--end_image=last.png"), ("loop", "--loop")):
      flags = " ".join([flag, *start.get(name, [])])
      jobs = generate.read_jobs(options(f"python -m hiar_jax.generate --prompt=a {flags}"))
      if name in can[what]:
        clips.plan_clips(model, jobs, [None], None)
      else:
        with pytest.raises(UserError, match="groups behind the section show it"):
          clips.plan_clips(model, jobs, [None], None)


def test_the_drawings_are_those_of_the_orders():
  rows = [
    drawn(FORWARDS, "vanilla", 2, given=4),
    drawn(BACKWARDS, "inverted", 3, given=1, behind=4),
    drawn(FILLING, "both_ends", 3, given=1, behind=1),
    drawn(FILLING, "both_ends", 4, loop=True),
  ]
  (text,) = [text for text in blocks("text") if "leads up" in text]
  shown = [line.split() for line in text.splitlines() if re.search(r"G", line)]
  assert shown == [[row[i] for row in rows if i < len(row)] for i in range(4)]


@pytest.mark.slow
def test_every_command_runs(place):
  for name in RUNS:
    saved_run(place / "runs" / name, config(name), ("teacher", "framepack"))
  for command in commands():
    wanted = options(command)
    for path in generate.generate(wanted):
      assert len(read_mp4(path)[0]) == wanted.frames
  assert (place / "filled.steps.png").exists() and not (place / "filled.partial.mp4").exists()
  for command in commands("stream"):
    values = flags(command, "stream")
    out, save = values.pop("out"), values.pop("save", None)
    path = stream.write(stream.read_options(values), out, save)
    assert len(read_mp4(path)[0]) == int(values["frames"])
