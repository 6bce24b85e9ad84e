"""A run so small that compiling it is what takes time: every stage in seconds.

Shared by the tests of the whole chain.
"""

import atexit
import fcntl
import functools
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np

from hiar_jax.checkpoints import training_state
from hiar_jax.config import left_out
from hiar_jax.data import tfds_builder
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.log import read_log
from hiar_jax.training.run import Run, open_run
from hiar_jax.video.mp4 import write_mp4
from tests.helpers.forks import Forks
from tests.helpers.video_reader import read_mp4

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("teacher", "causal_init", "distill")

TINY = {
  "data.clips": 16,
  "data.size": 16,
  "data.frames": 4,
  "history.block": 2,
  "history.window": 4,
  "codec.channels": 8,
  "text.dim": 8,
  "text.length": 12,
  "model.dim": 16,
  "model.ffn_dim": 16,
  "model.num_layers": 1,
  "model.num_heads": 1,
  "model.freq_dim": 16,
  "teacher.steps": 6,
  "teacher.batch": 4,
  "trajectories.count": 6,
  "trajectories.batch": 4,
  "trajectories.steps": 4,
  "causal_init.steps": 4,
  "causal_init.batch": 4,
  "distill.steps": 6,
  "distill.batch": 4,
  "distill.critic_updates": 2,
  "sample.count": 3,
  "sample.measure": 3,
  "sample.batch": 2,
  "log.every": 1,
  "log.checkpoint_every": 2,
  "log.preview_every": 100,
}


def make_config(**changes):
  """The config as a ConfigDict, for tests in this process; names with __ for dots."""
  config = runpy.run_path(str(ROOT / "experiments" / "shapes.py"))["get_config"]("smoke")
  added = left_out.add(config, Experiment)  # as the command
  changes = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
  config.update_from_flattened_dict(changes)
  replaced = tuple(f"{name}." for name, value in changes.items() if isinstance(value, dict))
  added = [name for name in added if not name.startswith(replaced)]
  left_out.drop(config, Experiment, added, changes)
  return config


# batches that eight devices divide
EIGHT = {
  "teacher__batch": 8,
  "causal_init__batch": 8,
  "distill__batch": 8,
  "trajectories__count": 8,
}


def make_run(workdir, extend: bool = False, **changes) -> Run:
  """The tiny run, opened in this process on all its devices."""
  return open_run(make_config(**{**EIGHT, **changes}), workdir, extend=extend)


def arguments(
  workdir, *extra: str, config: str = "experiments/shapes.py:smoke", **changes
) -> list[str]:
  """The command line of the tiny run; `changes` as in make_config."""
  overrides = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
  return [
    f"--config={config}",
    f"--workdir={workdir}",
    *(f"--config.{k}={v}" for k, v in overrides.items()),
    *extra,
  ]


def environment(devices: int = 1) -> dict[str, str]:
  """Compiles little and once: what one process of the session has compiled the others read."""
  return {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": str(ROOT),
  }


class Chain:
  """Runs `python -m hiar_jax.train` in processes of its own; `straight` is the workdir of one that
  nobody disturbed.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._idle: dict[int, list[Forks]] = {}  # by their devices

  def python(self, *command: str, devices: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, *command],
      cwd=ROOT,
      env=environment(devices),
      capture_output=True,
      text=True,
      timeout=900,
    )

  def train(
    self, workdir, *extra: str, die: str = "", devices: int = 1, **changes
  ) -> subprocess.CompletedProcess:
    """die: see VICTIM."""
    start = ["-c", VICTIM, die] if die else ["-m", "hiar_jax.train"]
    return self.python(*start, *arguments(workdir, *extra, **changes), devices=devices)

  @functools.cached_property
  def straight(self) -> pathlib.Path:
    """Trained once for all workers of a session; each has a copy, for some tests touch it."""
    workdir = self.directory / "straight"
    if "PYTEST_XDIST_WORKER" not in os.environ:
      self._train_straight(workdir)
      return workdir
    whole = self.directory.parent / "straight"
    with (self.directory.parent / "straight.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not whole.exists():
        self._train_straight(workdir)
        shutil.copytree(workdir, whole.with_suffix(".tmp"), dirs_exist_ok=True)
        whole.with_suffix(".tmp").rename(whole)
    if not workdir.exists():
      shutil.copytree(whole, workdir)
    return workdir

  def _train_straight(self, workdir: pathlib.Path) -> None:
    done = self.train(workdir)
    assert done.returncode == 0, done.stderr

  def commands(
    self,
    cases: list[tuple[str, list[str]]],
    devices: int = 1,
    root: pathlib.Path = ROOT,
    **variables: str,
  ) -> list[tuple[int, str, str]]:
    """[(module, arguments)] -> (exit status, stdout, stderr) of each; all are forks of one process
    that has imported jax, and the package of the tree `root`. variables: of its environment.
    """
    make = lambda: Forks(
      root, root, IMPORTS, {**environment(devices), **variables}, warnings="ignore"
    )
    kept = root == ROOT and not variables  # for the next commands
    idle = self._idle.setdefault(devices, []) if kept else []
    forks = idle.pop() if idle else make()
    results = [forks.run(COMMAND, [module, *arguments]) for module, arguments in cases]
    if kept:
      idle.append(forks)
    else:
      forks.close()
    return results

  def close(self) -> None:
    for idle in self._idle.values():
      while idle:
        idle.pop().close()


@functools.cache
def chain(directory: pathlib.Path) -> Chain:
  """One for all test modules of a session (directory: tmp_path_factory.getbasetemp())."""
  made = Chain(directory)
  atexit.register(made.close)
  return made


# Trains, and comes to grief at a chosen moment: `open:teacher/checkpoints/2:3` is SIGKILL when the
# third file whose path holds `teacher/checkpoints/2` is opened (os.rename: when a file gets its
# name); `step::7` is SIGTERM before the end of update 7.
VICTIM = """
import os, runpy, signal, sys

event, part, count = sys.argv[1].split(":")
left = int(count)

def strike(number):
  global left
  left -= 1
  if left == 0:
    os.kill(os.getpid(), number)

def audit(name, args):
  if name == event and part in "".join(str(a) for a in args):
    strike(signal.SIGKILL)

if event == "step":
  from hiar_jax.preemption import Preemption
  ask = Preemption.requested
  Preemption.requested = lambda self, step: strike(signal.SIGTERM) or ask(self, step)
else:
  sys.addaudithook(audit)
sys.argv = sys.argv[1:]
runpy.run_module("hiar_jax.train", run_name="__main__", alter_sys=True)
"""

IMPORTS = "import hiar_jax.train, hiar_jax.generate"
COMMAND = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0].replace(".", "/") + ".py", run_name="__main__")
"""


def pretend(workdir: pathlib.Path, stage: str, step: int) -> None:
  """Makes a file where a stage has its checkpoint."""
  folder = pathlib.Path(workdir) / stage / "checkpoints" / str(step)
  folder.mkdir(parents=True)
  (folder / "state").write_text("")


def write_clips(folder: pathlib.Path, count: int, colours=((200, 60, 60),), size: int = 16) -> None:
  """`count` videos of one colour each and of one training clip, with captions: `0 0`, `1 0`, ..."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    frame = np.broadcast_to(
      np.asarray(colours[i * len(colours) // count], np.uint8), (size, size, 3)
    )
    name = f"{i:03}"
    write_mp4(folder / f"{name}.mp4", np.stack([frame] * 4), 8, {})
    (folder / f"{name}.txt").write_text(f"colour {i * len(colours) // count} clip {i}")


# -------------------------------------------------------------------------------- what a run leaves


def state(workdir, stage: str, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint's `state`, by its path."""
  directory = pathlib.Path(workdir) / stage / "checkpoints"
  leaves = jax.tree_util.tree_leaves_with_path(training_state.load_state(directory, step))
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): numbers(leaf) for path, leaf in leaves
  }


def numbers(leaf: jax.Array) -> np.ndarray:
  """An array's numbers, also of a random key."""
  return np.asarray(
    jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  )


def log(workdir, stage: str | None = None) -> list[dict]:
  """The records of numbers in metrics.jsonl, without their times."""
  records = read_log(pathlib.Path(workdir) / "logs" / "metrics.jsonl", stage)
  return [
    {name: value for name, value in record.items() if name != "time"}
    for record in records
    if "scalars" in record
  ]


def trajectories(workdir) -> tuple[np.ndarray, list[bytes]]:
  source = tfds_builder.open_source(pathlib.Path(workdir) / "trajectories")
  records = [source[i] for i in range(len(source))]
  return np.stack([r["trajectory"] for r in records]), [r["caption"] for r in records]


def videos(workdir) -> dict[str, np.ndarray]:
  """Name -> frames of the videos of stage `sample`."""
  return {
    path.name: read_mp4(path)[0]
    for path in sorted((pathlib.Path(workdir) / "sample").glob("*.mp4"))
  }


def assert_same_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same_run(a, b, steps={"teacher": 6, "causal_init": 4, "distill": 6}) -> None:  # noqa: B006
  """Bit for bit: every stage's whole state, the log, the trajectories, the videos and what was
  measured on them.
  """
  a, b = pathlib.Path(a), pathlib.Path(b)
  assert log(a) == log(b)
  for stage, step in steps.items():
    assert_same_arrays(state(a, stage, step), state(b, stage, step))
  (points_a, captions_a), (points_b, captions_b) = trajectories(a), trajectories(b)
  np.testing.assert_array_equal(points_a, points_b)
  assert captions_a == captions_b
  assert_same_arrays(videos(a), videos(b))
  for name in ("config.json", "data/codec.npz", "sample/metrics.json", "sample/contact_sheet.png"):
    assert (a / name).read_bytes() == (b / name).read_bytes(), name
  assert not [*a.rglob("*.tmp"), *a.rglob("*orbax-checkpoint-tmp*"), *a.rglob("*.damaged")]


def files(workdir) -> dict[str, tuple[int, int]]:
  """Path -> (size, time of change) of everything below a directory."""
  root = pathlib.Path(workdir)
  found = sorted(p for p in root.rglob("*") if p.is_file())
  return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def kept(workdir) -> dict[str, tuple[int, int]]:
  """The same, without what every start writes."""
  started = ("config.json", "logs/starts.jsonl")
  return {path: facts for path, facts in files(workdir).items() if path not in started}
