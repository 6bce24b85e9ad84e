"""`python -m hiar_jax.stream` and `hiar_jax.serve` on a trained run: the same video as generate's,
in a file, in pictures, gone on with.
"""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
from PIL import Image
import pytest

from hiar_jax import serve
from hiar_jax.generation import timeline
from hiar_jax.streaming.producer import Stream
from hiar_jax.video import fragmented_mp4
from hiar_jax.video.mp4 import read_metadata
from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4

PROMPT = "a red circle moving left"
DAY = "0s: a red circle moving left, 1s: a blue square moving up"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
  """What several commands made: name -> (status, stdout, stderr), and the directory that they wrote
  to.
  """
  out, workdir = tmp_path_factory.mktemp("stream"), chain.straight
  run, before = f"--workdir={workdir}", tiny_run.files(workdir)
  prompt, saved = f"--prompt={PROMPT}", out / "saved"
  commands = {
    "generated": (
      "generate",
      [run, prompt, "--frames=12", "--seed=5", f"--out={out}/generated.mp4"],
    ),
    "whole": ("stream", [run, prompt, "--frames=12", "--seed=5", f"--out={out}/whole.mp4"]),
    "first": (
      "stream",
      [run, prompt, "--frames=5", "--seed=5", f"--out={out}/parts.mp4", f"--save={saved}"],
    ),
    "rest": (
      "stream",
      [run, f"--resume={saved}", "--frames=12", f"--out={out}/parts.mp4", "--level_devices=2"],
    ),
  }
  cases = [(f"hiar_jax.{module}", command) for module, command in commands.values()]
  results = dict(zip(commands, chain.commands(cases, devices=2), strict=True))
  assert tiny_run.files(workdir) == before  # a run is read and not touched
  return results, out


@pytest.fixture(scope="module")
def started(chain, made):
  """A video of timed prompts, as pictures, and one that starts from a picture."""
  _, out = made
  (out / "day.txt").write_text("# two things\n" + DAY.replace(", ", "\n"))
  Image.fromarray(np.full((20, 20, 3), (200, 40, 40), np.uint8)).save(out / "start.png")
  run, prompt = f"--workdir={chain.straight}", f"--prompt={PROMPT}"
  commands = [
    [run, f"--timeline={out}/day.txt", "--frames=16", "--seed=5", f"--out={out}/day"],
    [run, prompt, f"--image={out}/start.png", "--frames=5", f"--out={out}/picture.mp4"],
  ]
  for status, _, err in chain.commands([("hiar_jax.stream", x) for x in commands], devices=2):
    assert status == 0 and "Traceback" not in err, err
  return out


def test_every_command_ends_well(made):
  for name, (status, _, err) in made[0].items():
    assert status == 0 and "Traceback" not in err, f"{name}: {err}"


def test_it_is_the_video_that_generate_makes(made):
  _, out = made
  a, b = (read_mp4(out / name, scale=8)[0].astype(int) for name in ("generated.mp4", "whole.mp4"))
  assert a.shape == b.shape == (12, 16, 16, 3)
  assert np.abs(a - b).mean() < 2


def test_the_file_says_how_it_was_made(made):
  results, out = made
  said = read_metadata(out / "whole.mp4")
  assert said["prompt"] == PROMPT and said["seed"] == "5" and said["workdir"] == "straight"
  # a block each
  assert [fragment.frames for fragment in fragmented_mp4.scan(out / "whole.mp4")[1:]] == [2] * 6
  assert results["whole"][1] == f"{out}/whole.mp4\n"


def test_saved_and_gone_on_with_on_another_layout(made):
  results, out = made
  a, b = (read_mp4(out / name, scale=8)[0].astype(int) for name in ("whole.mp4", "parts.mp4"))
  assert a.shape == b.shape and np.abs(a - b).mean() < 2
  assert "goes on from there" in results["first"][2]
  assert [fragment.first for fragment in fragmented_mp4.scan(out / "parts.mp4")[1:]] == [
    0,
    2,
    4,
    6,
    8,
    10,
  ]


@pytest.mark.slow
def test_a_timeline_into_pictures(started):
  out = started
  names = sorted(os.listdir(out / "day"))
  assert names == [f"{i:06d}.png" for i in range(16)]
  frames = np.stack([np.asarray(Image.open(out / "day" / name)) for name in names]).astype(int)
  same = read_mp4(out / "whole.mp4", scale=8)[0].astype(int)
  assert np.abs(frames[:8] - same[:8]).mean() < 4  # before the change it is the same video


@pytest.mark.slow
def test_a_picture_comes_first(started):
  out = started
  frames = read_mp4(out / "picture.mp4", scale=8)[0]
  assert len(frames) == 5 and [
    fragment.frames for fragment in fragmented_mp4.scan(out / "picture.mp4")[1:]
  ] == [1, 2, 2]


@pytest.fixture(scope="module")
def refused(chain, made, tmp_path_factory):
  """What the commands that cannot work say: name -> (status, stdout, stderr)."""
  out, (_, before) = tmp_path_factory.mktemp("refused"), made
  (out / "text.png").write_text("not a picture")
  (out / "back.txt").write_text("0s: a\n5s: b\n 2s: c\n")
  run, prompt, mp4 = f"--workdir={chain.straight}", f"--prompt={PROMPT}", f"--out={out}/x.mp4"
  commands = {
    "no workdir": ["stream", prompt],
    "no prompt": ["stream", run],
    "both": ["stream", run, prompt, f"--timeline={DAY}"],
    "a timeline that goes back": ["stream", run, f"--timeline={out}/back.txt", mp4],
    "a timeline that cannot be read": ["stream", run, "--timeline=0s: a, 1:75: b", mp4],
    "prompts too close": ["stream", run, "--timeline=0s: a, 0.05s: b, 0.1s: c", mp4],
    "no such timeline": ["stream", run, f"--timeline={out}/absent.txt", mp4],
    "not an image": ["stream", run, prompt, f"--image={out}/text.png", mp4],
    "a wrong ending": ["stream", run, prompt, f"--out={out}/x.gif"],
    "already there": ["stream", run, prompt, f"--out={before}/whole.mp4"],
    "three stages": ["stream", run, prompt, "--level_devices=3", mp4],
    "nothing saved": ["stream", run, f"--resume={out}/nowhere", mp4],
    "another model": ["stream", run, f"--resume={before}/saved", "--stage=causal_init", mp4],
    "as many already": ["stream", run, f"--resume={before}/saved", "--frames=2", mp4],
    "frames in words": ["stream", run, prompt, "--frames=many"],
    "a wrong port": ["serve", run, "--port=70000"],
  }
  with serve.listen("127.0.0.1", 0) as taken:
    commands["a port in use"] = ["serve", run, f"--port={taken.getsockname()[1]}"]
    results = chain.commands(
      [(f"hiar_jax.{module}", command) for module, *command in commands.values()], devices=2
    )
  return dict(zip(commands, results, strict=True)), out


WRONG = {
  "no workdir": "--workdir is missing",
  "no prompt": "give either --prompt",
  "both": "give either --prompt",
  "a timeline that goes back": "line 3, column 2: 2s comes after 5s",
  "a timeline that cannot be read": "timeline, line 1, column 8: 1:75 is not a time",
  "prompts too close": "0.1s falls on the same block as 0.05s",
  "no such timeline": "No such file",
  "not an image": "text.png is not an image",
  "a wrong ending": "expected a name that ends in .mp4",
  "already there": "is there already",
  "three stages": "level can be 1, 2 or 4",
  "nothing saved": "holds no saved generation",
  "another model": "was saved by another model",
  "as many already": "frames",
  "frames in words": "expected a whole number, or 'endless'",
  "a wrong port": "port",
  "a port in use": "of 127.0.0.1 is in use; give another one, as --port=",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_one_line(refused, name):
  results, out = refused
  status, said, err = results[name]
  *notes, error = err.splitlines()
  assert status == 2 and said.count("\n") <= 1 and error.startswith("error: "), (status, said, err)
  assert WRONG[name] in error, err
  # a stage that is asked for is said before its weights are compared
  assert len(notes) == (name == "another model"), err
  assert not (out / "x.mp4").exists()


PAGE = tiny_run.ROOT / "docs" / "stream.md"


@pytest.mark.slow
def test_every_command_of_the_page_runs(chain, tmp_path):
  blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
  lines = [shlex.split(line) for line in "".join(blocks).splitlines()]
  assert len(lines) == 5
  there = {"--workdir=runs/shapes": f"--workdir={chain.straight}"}
  move = lambda word: (
    there.get(word) or re.sub(r"^--(out|save|resume)=", rf"--\1={tmp_path}/", word)
  )
  results = chain.commands([(line[2], [move(word) for word in line[3:]]) for line in lines])
  assert [(status, err.count("Traceback")) for status, _, err in results] == [(0, 0)] * 5, results
  assert (
    len(read_mp4(tmp_path / "part.mp4")[0]) == 120 and len(os.listdir(tmp_path / "pictures")) == 40
  )


def test_the_page_tells_the_truth():
  text = PAGE.read_text()
  (day,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
  assert [(entry.time, entry.prompt, entry.recache) for entry in timeline.parse(day).entries] == [
    (0, "a red circle moving left", False),
    (10, "a blue square, moving up", False),
    (90, "a green star", True),
    (120, "", False),
  ]
  defaults = {field.name: field.default for field in dataclasses.fields(serve.ServeOptions)}
  limits = ("max_generations", "max_clients", "buffer_seconds", "idle_timeout", "grace")
  for name in (*limits, "max_seconds"):
    assert re.search(rf"`--{name}`[^(]*\({defaults[name]:g}\)", text), name
  for name in re.findall(r"`stream\.(\w+)", text):
    assert hasattr(Stream, name), name
  for link in re.findall(r"\]\(([\w./]+)\)", text):
    assert (PAGE.parent / link).exists(), link


def test_ctrl_c_ends_an_endless_stream_with_a_whole_file(chain, tmp_path):
  command = [
    sys.executable,
    "-m",
    "hiar_jax.stream",
    f"--workdir={chain.straight}",
    f"--prompt={PROMPT}",
    f"--out={tmp_path}/x.mp4",
  ]
  environment = tiny_run.environment()
  command += [f"--save={tmp_path}/saved"]
  with subprocess.Popen(
    command, env=environment, cwd=tiny_run.ROOT, stderr=subprocess.PIPE, text=True
  ) as process:
    while not (tmp_path / "x.mp4").exists() or (tmp_path / "x.mp4").stat().st_size < 10_000:
      assert process.poll() is None
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
  assert process.returncode == 0 and "goes on from there" in err and "Traceback" not in err, err
  frames = read_mp4(tmp_path / "x.mp4")[0]
  assert len(frames) >= 6 and len(frames) % 2 == 0 and any((tmp_path / "saved").iterdir())


@pytest.mark.slow
def test_the_page_of_a_trained_run(chain, made, tmp_path):
  _, out = made
  pytest.importorskip("aiohttp", reason="the page needs the extra [serve]")
  from tests.helpers.browser_tab import run, tab

  command = [sys.executable, "-m", "hiar_jax.serve", f"--workdir={chain.straight}", "--port=0"]
  environment = {**tiny_run.environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
  with subprocess.Popen(
    command,
    env=environment,
    cwd=tiny_run.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    line = process.stdout.readline()
    assert line.startswith("watch at http://127.0.0.1:"), line + process.stderr.read()

    class Server:
      url = line.split()[-1].rstrip("/")

    async def visit():
      async with tab(Server) as one:
        await one.say(do="start", prompt="a purple zebra", seconds=2)
        await one.until(lambda tab: tab.is_in("finished"))
        async with tab(Server) as two:
          await two.hand_in(
            (out / "start.png").read_bytes(), name="start.png", prompt=PROMPT, seconds=1
          )
          await two.until(lambda tab: tab.is_in("finished"))
        return one.video, one.status, two.video, two.heard["given"]["done"]

    with urllib.request.urlopen(Server.url) as page:
      assert b"<title>hiar_jax</title>" in page.read()
    video, status, started, said = run(visit())
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
  assert process.returncode == 0 and "Traceback" not in err, err
  assert len(status["levels"]) == 4 and len(video) > 1000 and json.dumps(status)
  assert status["remarks"] == [
    "prompt 'a purple zebra': the model does not know 'purple', 'zebra'; it is made without"
  ]
  (tmp_path / "started.mp4").write_bytes(started)
  a, b = (
    read_mp4(path, scale=8)[0].astype(int)[:5]
    for path in (tmp_path / "started.mp4", out / "picture.mp4")
  )
  assert np.abs(a - b).mean() < 2  # as the command makes it of the same picture
  assert said == "start.png: 20x20, scaled by 0.8 to cover 16x16"
  assert read_metadata(tmp_path / "started.mp4")["start"] == "image start.png"
