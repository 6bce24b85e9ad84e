"""What benchmarks.against measures: jobs, which run commands of one tree in fresh processes.

Every value is in seconds or in bytes, so that less is better everywhere: wall-clock time; CPU time,
user and system, of the process and of those that it waited for, on all cores together, which other
load on the machine disturbs less; and the most memory that was resident at once. Compiled programs
are not kept from one process to the next.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import trees

Values = dict[
  str, float
]  # what was measured -> seconds, or bytes where the name ends with "memory"

PROMPTS = tuple(
  f"a {colour} {shape} moving {way}"
  for colour, shape, way in (
    ("red", "circle", "left"),
    ("blue", "square", "up"),
    ("green", "star", "down"),
  )
)
# The main job's networks and frames, and as little training as there is.
UNTRAINED = {
  "data.clips": 64,
  "teacher.steps": 1,
  "trajectories.count": 16,
  "trajectories.batch": 16,
  "causal_init.steps": 1,
  "distill.steps": 1,
  "sample.count": 1,
  "sample.measure": 1,
  "sample.batch": 1,
}
VIDEOS = 8  # that job `generate` makes, one at a time


@dataclasses.dataclass(frozen=True)
class Tree:
  """A tree as jobs see it. scratch: where its processes run, and keep what a job prepares."""

  name: str
  path: pathlib.Path
  scratch: pathlib.Path

  def run(self, *arguments: str, statuses: tuple[int, ...] = (0,)) -> "Ended":
    """Runs Python with these arguments. Raises trees.TreeError for another exit status."""
    environment = trees.environment(self.path)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
      process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=self.scratch,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
      )
      with process.stdout:
        lines = [(time.perf_counter() - start, line.rstrip("\n")) for line in process.stdout]
      _, status, usage = os.wait4(process.pid, 0)
      wall = time.perf_counter() - start
      process.returncode = os.waitstatus_to_exitcode(status)
      if process.returncode not in statuses:
        errors.seek(0)
        said = errors.read().decode(errors="replace").splitlines()[-8:]
        failed = f"{self.name}: {' '.join(arguments)} ended with {process.returncode}"
        raise trees.TreeError("\n  ".join([failed, *said]))
    return Ended(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, lines)

  def config(self, name: str) -> str:
    return f"--config={self.path}/experiments/{name}"


@dataclasses.dataclass(frozen=True)
class Ended:
  """A process that has ended. lines: of stdout, each with the second at which it came."""

  wall: float
  cpu: float
  memory: int
  lines: list[tuple[float, str]]

  def values(self, name: str) -> Values:
    return {name: self.wall, f"{name}, CPU": self.cpu, f"{name}, memory": float(self.memory)}

  def json(self) -> dict:
    return json.loads("\n".join(line for _, line in self.lines))


@dataclasses.dataclass(frozen=True)
class Options:
  """config: of job `train`; updates: of each stage there; blocks: of job `stream`."""

  config: str = "shapes.py"
  updates: int = 10
  blocks: int = 200


@dataclasses.dataclass(frozen=True)
class Job:
  """about: what its numbers include. measure: one run. prepare: once a tree, not measured."""

  about: str
  measure: Callable[[Tree, Options], Values]
  prepare: Callable[[Tree, Options], None] = lambda tree, options: None


# --------------------------------------------------------------------------------------- the jobs


def start(tree: Tree, options: Options) -> Values:
  del options
  imported = tree.run("-c", "import hiar_jax")
  helped = tree.run("-m", "hiar_jax.train", "--help", statuses=(0, 1))  # absl ends with 1 after it
  return {**imported.values("import hiar_jax"), **helped.values("train --help")}


def smoke(tree: Tree, options: Options) -> Values:
  del options
  with tempfile.TemporaryDirectory(dir=tree.scratch) as folder:
    where = tree.config("shapes.py:smoke"), f"--workdir={folder}/run"
    return tree.run("-m", "hiar_jax.train", *where).values("train, smoke")


def train(tree: Tree, options: Options) -> Values:
  what = tree.config(options.config), f"--updates={options.updates}"
  found, values = tree.run("-m", "benchmarks.train", *what).json(), {}
  for name, stage in found["stages"].items():
    values[f"{name} update"] = stage["update_s"]["median"]
    values[f"{name} compile"] = stage["compile_s"]
    values[f"{name} memory"] = float(stage["peak_bytes"])
  return values


def prepare_generate(tree: Tree, options: Options) -> None:
  del options
  small = [f"--config.{name}={value}" for name, value in UNTRAINED.items()]
  tree.run("-m", "hiar_jax.train", tree.config("shapes.py"), "--workdir=untrained", *small)
  prompts = [PROMPTS[i % len(PROMPTS)] for i in range(VIDEOS)]
  (tree.scratch / "prompts.txt").write_text("\n".join(prompts) + "\n")


def generate(tree: Tree, options: Options) -> Values:
  del options
  with tempfile.TemporaryDirectory(dir=tree.scratch) as out:
    what = "--workdir=untrained", "--prompts=prompts.txt", "--frames=36", f"--out={out}"
    ended = tree.run("-m", "hiar_jax.generate", *what)
  times = [second for second, line in ended.lines if line.endswith(".mp4")]
  if len(times) != VIDEOS:
    raise trees.TreeError(f"{tree.name}: generate told of {len(times)} videos, not of {VIDEOS}")
  each = (times[-1] - times[0]) / (VIDEOS - 1)
  whole = ended.values(f"generate, {VIDEOS} videos")
  return {"first video": times[0], "each video after it": each, **whole}


def stream(tree: Tree, options: Options) -> Values:
  what = tree.config("shapes.py"), "--layouts=1x1x1", f"--blocks={options.blocks}"
  found = tree.run("-m", "benchmarks.stream", *what).json()["layouts"][0]
  latents, frames = found["without_decoding"], found["with_decoding"]
  return {
    "stream compile": found["compile_s"],
    "first latents": latents["first_latents_s"],
    "each block, latents": latents["interval_s"]["median"],
    "first frames": frames["first_frames_s"],
    "each block, frames": frames["interval_s"]["median"],
  }


JOBS = {
  "start": Job(
    "The whole process: `python -c 'import hiar_jax'`, and `python -m hiar_jax.train --help`. "
    "Nothing is compiled.",
    start,
  ),
  "smoke": Job(
    "The whole process: train with shapes.py:smoke, from no directory to videos; start and "
    "compiling included.",
    smoke,
  ),
  "train": Job(
    "benchmarks.train of each tree. Update: the median of those after the first, no compiling in "
    "it. Compile: tracing, compiling and the first update. Memory: the process's most until then.",
    train,
  ),
  "generate": Job(
    f"generate, {VIDEOS} videos of 36 frames one by one, from an untrained run of shapes.py's "
    "sizes. First video: until its path is printed, start and compiling included; each after it: "
    "neither. The rest: the whole process.",
    generate,
    prepare_generate,
  ),
  "stream": Job(
    "benchmarks.stream of each tree, shapes.py on one device. Compile: building the engine and the "
    "first run of each program. None of it in the others: until the first block, and the median "
    "between blocks, as latents and as frames.",
    stream,
  ),
}
