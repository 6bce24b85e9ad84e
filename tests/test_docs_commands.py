"""Every command that a page shows is one that the program takes: its module, flags and config.

Those of docs/errands.md name files that the reader writes; tests/test_errands.py performs them.
"""

import json
import os
import re
import shlex
import subprocess
import sys

from tests.helpers import tiny_run

ROOT = tiny_run.ROOT
PAGES = [
  ROOT / "README.md",
  *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "errands.md"),
]
# Parses each command in a process of its own, forked from one that has imported what takes long.
PARSER = """
import argparse, json, os, runpy, sys
from absl import app, flags
from hiar_jax.config.building import build
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


def test_every_command_of_every_page_is_taken():
  found = [command for page in PAGES for command in commands(page.read_text())]
  modules = {command[0] for command in found}
  assert len(found) > 50 and {"hiar_jax.train", "hiar_jax.evaluate", "benchmarks.card"} <= modules
  results, said = statuses(found)
  refused = [" ".join(c) for c, status in zip(found, results, strict=True) if status]
  assert not refused, f"{refused}\n{said[-4000:]}"


WRONG = (
  "hiar_jax.train --config=experiments/shapes.py --wrokdir=a",
  "hiar_jax.train --config=experiments/shape.py --workdir=a",
  "hiar_jax.train --config=experiments/shapes.py --config.teacher.stesp=3 --workdir=a",
  "hiar_jax.train --config=experiments/shapes.py --config.history.order=sideways --workdir=a",
  "hiar_jax.evaluate --length=long",
  "benchmarks.walk",
  "benchmarks.against --rounds=many 52ee043",
)


def test_others_are_not():
  results, said = statuses([command.split() for command in WRONG])
  assert all(results), said
