"""Bit for bit: `python -m benchmarks.same REVISION` says whether the working tree does the same.

The same commands run in both trees, each with its own code (trees.py), and everything that they
leave is compared (contents.py): arrays of checkpoints and of saved streams, trajectories, logs
without times, decoded frames, configs. Prints a line a thing, then the first differences of each
part, in the order in which they were made. Exit status 1: there are some; 2: there is nothing to
compare. A part is a method, from an empty directory to videos and streams:

    hiar, self_forcing, self_aligned    smaller than experiments/shapes*.py:smoke, each with other
                                        settings beside
    wan                                 conversion, training and generation with small random
                                        weights of Wan's layout, made by helpers of the revision's
                                        own tests

Nothing is timed here, so XLA optimises little (`--full_optimisation` leaves it alone), and programs
that the trees have in common are compiled once. `--self` runs the revision twice instead, each time
compiling anew: where this finds a difference, the comparison means nothing. `--keep=DIR` keeps
everything, for a look at it and for the next comparison with the same revision, which then is not
run again.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

from benchmarks import contents, same_commands, trees
from benchmarks.same_commands import Command

SHOWN = 10  # differences of a part that are told again at the end
FORKS = pathlib.Path(__file__).with_name("forks.py")
PACKAGES = "jax jaxlib flax optax orbax-checkpoint grain tensorstore numpy av".split()


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two trees. Its commands run in `out`, a directory a part.

  strict: a command that fails here leaves nothing to compare.
  """

  name: str
  folder: pathlib.Path
  environment: dict[str, str]
  strict: bool

  @property
  def tree(self) -> pathlib.Path:
    return self.folder / "tree"

  @property
  def out(self) -> pathlib.Path:
    return self.folder / "out"


def variables(options: argparse.Namespace, cache: pathlib.Path) -> dict[str, str]:
  """Of JAX, for commands of both trees. cache: of compiled programs."""
  quick = {} if options.full_optimisation else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  return {
    **quick,
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    "JAX_NUM_CPU_DEVICES": str(options.devices),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def open_sides(
  options: argparse.Namespace, work: pathlib.Path, root: pathlib.Path
) -> tuple[Side, Side]:
  """Both trees in their directories; what is kept of the revision is found again."""
  commit, sides = trees.commit(options.revision, root), []
  shared = variables(options, work / "compiled")
  names = ("first", "second") if options.itself else (key(commit, shared), "new")
  for name, folder in zip(("old", "new"), (work / name for name in names), strict=True):
    tree, of_revision = folder / "tree", name == "old" or options.itself
    if name == "new" or options.itself:
      shutil.rmtree(folder, ignore_errors=True)
    if not of_revision:
      trees.snapshot(tree, root)
    elif not tree.exists():
      trees.unpack(commit, tree, root)
    used = variables(options, folder / "compiled") if options.itself else shared
    sides.append(Side(name, folder, trees.environment(tree, **used), strict=of_revision))
    trees.check(tree)
  return sides[0], sides[1]


def key(commit: str, environment: dict[str, str]) -> str:
  """A name for what a revision's outputs depend on: also packages, the machine, and what is run."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  sources = [pathlib.Path(same_commands.__file__), FORKS]
  depends = [
    commit,
    environment,
    versions,
    platform.uname()[1:],
    len(os.sched_getaffinity(0)),
    *(source.read_text() for source in sources),
  ]
  digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
  return f"{commit[:12]}-{digest[:12]}"


# ---------------------------------------------------------------------------------------- running


def run_part(side: Side, part: str, commands: list[Command], inputs: pathlib.Path) -> None:
  """Leaves in `out/<part>` what the commands leave; a part that is there is left as it is.

  Raises trees.TreeError where a command of a strict side fails.
  """
  folder, done, failed = side.out / part, side.out / f"{part}.done", ""
  if done.exists():
    return
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(inputs, folder)
  task = {"strict": side.strict, "commands": [command.of(side.tree) for command in commands]}
  with subprocess.Popen(
    [sys.executable, "-W", "ignore", "-P", str(FORKS)],
    cwd=folder,
    env=side.environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    process.stdin.write(json.dumps(task))
    process.stdin.close()
    for line in process.stdout:
      name, status, seconds, cpu = line.split()
      told = f"{side.name} {part}: {name}, {seconds} s ({cpu} s of CPU time)"
      print(told, file=sys.stderr, flush=True)
      if status != "0":
        failed = f"{side.name} {part}: {name} ended with status {status}"
        said = (folder / "commands" / f"{name}.stderr").read_text().splitlines()[-15:]
        print(failed, *said, sep="\n  ", file=sys.stderr, flush=True)
  if process.returncode:
    raise trees.TreeError(f"{side.name} {part}: its commands ended with {process.returncode}")
  if failed and side.strict:
    raise trees.TreeError(failed)
  done.touch()


def inputs_of(part: str, old: Side) -> pathlib.Path:
  """The files that the part's commands start from, the same ones for both trees."""
  folder, half = old.folder / "inputs" / part, old.folder / "inputs" / f"{part}.half"

  def run_python(code: str, where: pathlib.Path) -> None:
    path = os.pathsep.join([old.environment["PYTHONPATH"], str(old.tree / "tests")])
    environment = {**old.environment, "PYTHONPATH": path}
    done = subprocess.run(
      [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True
    )
    if done.returncode:
      why = done.stderr.strip().splitlines()[-1]
      raise trees.TreeError(f"part {part}: the revision cannot make its inputs ({why})")

  if not folder.exists():
    shutil.rmtree(half, ignore_errors=True)
    same_commands.write_inputs(part, half, run_python)
    half.rename(folder)
  return folder


def run_all(sides: tuple[Side, Side], parts: dict[str, list[Command]], workers: int) -> None:
  """Every part in both trees, `workers` of them at once."""
  inputs = {part: inputs_of(part, sides[0]) for part in parts}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    tasks = [
      pool.submit(run_part, side, part, commands, inputs[part])
      for side in sides
      for part, commands in parts.items()
    ]
    try:
      for task in concurrent.futures.as_completed(tasks):
        task.result()
    except trees.TreeError:
      pool.shutdown(cancel_futures=True)
      raise


# ------------------------------------------------------------------------------------- the report


def report(old: pathlib.Path, new: pathlib.Path, parts: list[str]) -> int:
  """Prints a line a thing and then the first differences; returns how many things differ."""
  found: dict[str, list[contents.Result]] = {}
  for part in parts:
    for result in contents.compare(old / part, new / part):
      found.setdefault(part, []).append(result)
      verdict = "DIFFERS" if result.differences else "same   "
      print(f"{verdict} {part}/{result.name}: {result.size}", flush=True)
  for part, results in found.items():
    lines = [f"{part}/{result.name}: {line}" for result in results for line in result.differences]
    if lines:
      head = f"\nthe first of {len(lines):,} differences in {part}:"
      print(head, *lines[:SHOWN], sep="\n  ")
  every = [result for results in found.values() for result in results]
  differing = sum(bool(result.differences) for result in every)
  print(f"\n{len(every):,} things compared, {differing:,} differ")
  return differing


def same(
  options: argparse.Namespace, parts: dict[str, list[Command]], root: pathlib.Path = trees.ROOT
) -> int:
  """Runs and compares; returns how many things differ. Raises trees.TreeError for none at all."""
  old = f"{options.revision} ({trees.commit(options.revision, root)[:12]})"
  new = old if options.itself else trees.name_of_working_tree(root)
  print(f"old: {old}; new: {new}", file=sys.stderr)
  with trees.scratch(options.keep) as work:
    sides = open_sides(options, work, root)
    run_all(sides, parts, options.workers)
    return report(sides[0].out, sides[1].out, list(parts))


def main() -> int:
  options, start = parse(), time.monotonic()
  every = same_commands.parts()
  try:
    differing = same(options, {part: every[part] for part in options.parts})
  except trees.TreeError as error:
    print("error:", error, file=sys.stderr)
    return 2
  print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
  return 1 if differing else 0


def parse(given: list[str] | None = None) -> argparse.Namespace:
  """given: the command's arguments; None: those that this process was started with."""
  head = __doc__.split("\n\n")[0]
  parser = argparse.ArgumentParser("python -m benchmarks.same", description=head)
  names = tuple(same_commands.parts())
  flag = parser.add_argument
  flag("revision", help="of git: the old tree")
  flag("--self", dest="itself", action="store_true", help="compare the revision with itself")
  flag("--parts", default=",".join(names[:3]), help=f"of {','.join(names)}; default: %(default)s")
  flag("--full_optimisation", action="store_true", help="let XLA optimise as it does in earnest")
  flag("--devices", type=int, default=1, help="virtual CPU devices of each command; default: 1")
  flag("--workers", type=int, default=2, help="parts that run at once; default: 2")
  flag("--keep", help="a directory for trees, outputs and compiled programs; default: temporary")
  options = parser.parse_args(given)
  options.parts = options.parts.split(",")
  for part in options.parts:
    if part not in names:
      parser.error(f"--parts: there is no {part!r}; there is {', '.join(names)}")
  return options


if __name__ == "__main__":
  sys.exit(main())
