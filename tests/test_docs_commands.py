"""Every command that a page shows is one that the program takes: its module, flags and config.
Those about the shapes world run, one after another, in a folder of a reader.

Those of docs/errands.md name files that the reader writes; tests/test_errands.py performs them.
docs/wan.md, stream.md and framepack.md have tests of their own.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.video_reader import read_mp4

ROOT = tiny_run.ROOT
SHAPES_PAGES = (
  "README.md",
  "docs/shapes.md",
  "docs/long_videos.md",
  "docs/evaluate.md",
  "docs/packing.md",
)
RUNS = re.compile(r"runs/|docs/rows|results/")
BOTH_ENDS = [
  "hiar_jax.train",
  "--config=experiments/shapes_framepack_both_ends.py",
  "--workdir=runs/both_ends",
]
PAGES = [
  ROOT / "README.md",
  *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "errands.md"),
]
# Parses each command in a process of its own, forked from one that has imported what takes long.
PARSER = """
import argparse, json, os, runpy, sys
from absl import app, flags
import hiar_jax.generate, hiar_jax.train
from hiar_jax.config.building import build
from hiar_jax.evaluation import report
from hiar_jax.generation import clips, conditioning_frames
from hiar_jax.training.experiment import Experiment

def parse_alone(main, argv=None, flags_parser=None):
  flags_parser(sys.argv)
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  if config is not None:
    build(Experiment, config)
  os._exit(0)

def parse_args(self, *arguments):
  parse_known(self, *arguments)
  os._exit(0)

parse_known, app.run = argparse.ArgumentParser.parse_args, parse_alone
argparse.ArgumentParser.parse_args = parse_args
statuses = []
for module, *arguments in json.load(sys.stdin):
  child = os.fork()
  if not child:
    print(module, *arguments, file=sys.stderr, flush=True)
    sys.argv = [module, *arguments]
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
      sys.stderr.flush()
      os._exit(1)
  statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def lines(text: str) -> list[str]:
  """The shell commands of a page, of its blocks and within its sentences; a loop is written out."""
  found = []
  for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
    block = re.sub(
      r"for (\w+) in ([^;]+); do\n(.*?)\ndone",
      lambda m: "\n".join(m[3].replace(f"${m[1]}", word) for word in m[2].split()),
      block.replace("\\\n", " "),
      flags=re.DOTALL,
    )
    found += block.splitlines()
  return found + re.findall(r"`((?:\.venv/bin/)?python -m [^`]+)`", text)


def commands(text: str) -> list[list[str]]:
  """[module, arguments ...] of those that start a module of this project."""
  found = []
  for line in lines(text):
    words = shlex.split(line.rpartition(" && ")[2], comments=True)
    if len(words) > 2 and words[0].endswith("python") and words[1] == "-m":
      found.append(words[2:])
  return [words for words in found if words[0].startswith(("hiar_jax.", "benchmarks."))]


def statuses(of: list[list[str]]) -> tuple[list[int], str]:
  done = subprocess.run(
    [sys.executable, "-c", PARSER],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""},
    input=json.dumps(of),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


WRONG = (
  "hiar_jax.train --config=experiments/shapes.py --wrokdir=a",
  "hiar_jax.train --config=experiments/shape.py --workdir=a",
  "hiar_jax.train --config=experiments/shapes.py --config.teacher.stesp=3 --workdir=a",
  "hiar_jax.train --config=experiments/shapes.py --config.history.order=sideways --workdir=a",
  "hiar_jax.evaluate --length=long",
  "benchmarks.walk",
  "benchmarks.against --rounds=many 52ee043",
)


@functools.cache
def answers() -> tuple[list[list[str]], list[int], str]:
  """(commands of all pages, the statuses of the wrong ones and then of these, what was said)."""
  found = [command for page in PAGES for command in commands(page.read_text())]
  return found, *statuses([*(command.split() for command in WRONG), *found])


def test_every_command_of_every_page_is_taken():
  found, results, said = answers()
  modules = {command[0] for command in found}
  assert len(found) > 50 and {"hiar_jax.train", "hiar_jax.evaluate", "benchmarks.card"} <= modules
  of_pages = zip(found, results[len(WRONG) :], strict=True)
  refused = [" ".join(c) for c, status in of_pages if status]
  assert not refused, f"{refused}\n{said[-4000:]}"


def test_others_are_not():
  _, results, said = answers()
  assert all(results[: len(WRONG)]), said


SMALL = """
import runpy

def get_config(variant="main"):
  config = runpy.run_path("{path}")["get_config"]("smoke")
  config.update_from_flattened_dict({sizes})
  return config
"""


def small(name: str) -> dict:
  """Sizes of an experiment that trains in seconds."""
  config = tiny_packed.load(name)
  shapes = {k: v for k, v in tiny_packed.SIZES.items() if k != "data.frames"}
  if "framepack" not in config:
    return shapes
  return shapes | {
    "framepack.steps": 2,
    "framepack.batch": 4,
    "sample.steps": 2,
    "sample.guidance": 0.0,
  }


@pytest.fixture
def reader(tmp_path):
  """A folder with the experiments, small, the rows of the docs, and clips."""
  (tmp_path / "experiments").mkdir()
  for path in [
    *sorted((ROOT / "experiments").glob("shapes*.py")),
    ROOT / "experiments" / "clips.py",
  ]:
    text = SMALL.format(path=path, sizes=small(path.stem))
    (tmp_path / "experiments" / path.name).write_text(text)
  clips = tmp_path / "clips"
  clips.mkdir()
  rng = np.random.default_rng(0)
  for i in range(16):
    write_mp4(clips / f"{i}.mp4", rng.integers(0, 256, (10, 72, 64, 3), np.uint8), 8)
    (clips / f"{i}.txt").write_text("a grey noise")
  return tmp_path


@pytest.mark.slow
def test_the_commands_about_shapes_run_as_they_stand(reader):
  """In the pages' order, with what docs/evaluate.md takes for granted trained before it."""
  pages = {name: commands((ROOT / name).read_text()) for name in SHAPES_PAGES}
  pages["docs/evaluate.md"].insert(0, BOTH_ENDS)
  ran = []
  for page, found in pages.items():
    for module, *arguments in found:
      serves = module == "hiar_jax.serve"  # until Ctrl-C: tests/serving
      if serves or module.startswith("benchmarks.") or not RUNS.search(" ".join(arguments)):
        continue
      if module == "hiar_jax.stream" and "--frames" not in " ".join(arguments):
        arguments.append("--frames=30")  # without, it goes on until Ctrl-C
      done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=reader,
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
        timeout=600,
      )
      line = f"{page}: {module} {' '.join(arguments)}"
      assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
      ran.append(module)
  assert len(ran) >= 20 and set(ran) == {
    f"hiar_jax.{name}" for name in ("train", "generate", "stream", "evaluate")
  }
  for name in ("clip.mp4", "stream.mp4", "packed.mp4"):
    assert len(read_mp4(reader / name)[0]) >= 30, name
  for name in ("compare", "compare_full", "table", "long_shapes", "framepack/table"):
    assert (reader / "runs" / name / "table.md").exists(), name
