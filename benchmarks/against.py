"""Side by side: `python -m benchmarks.against REVISION` says which tree is slower, and by how much.

The working tree and a revision of it run the same jobs with their own code (trees.py), in fresh
processes, in alternating rounds: old new, new old, old new, ..., so that a machine that gets
warmer or busier counts for both. A first round is not counted: it compiles Python's files and
fills the disk cache. Prints a table: of each measure the median of the rounds with the smallest
and the largest, and the ratio new / old, the median of the rounds' ratios with the smallest and
the largest. All measures are times or bytes: a ratio above 1 is slower, or more. A difference
means something where the ratios of all rounds lie on one side of 1; `--rounds` gives more of them.
What a job's numbers include is printed above its table (against_jobs.py).
"""

import argparse
from collections.abc import Iterator
import dataclasses
import json
import pathlib
import statistics
import sys

from benchmarks import trees
from benchmarks.against_jobs import JOBS, Job, Options, Tree, Values

_MACHINE = """
import json
from benchmarks import machine
print(json.dumps({"hardware": machine.hardware(), "versions": machine.versions()}))
"""


@dataclasses.dataclass(frozen=True)
class Spread:
  """The median of some numbers, with the smallest and the largest."""

  median: float
  low: float
  high: float


def spread(numbers: list[float]) -> Spread:
  return Spread(statistics.median(numbers), min(numbers), max(numbers))


def ratio(old: list[float], new: list[float]) -> Spread:
  """Of new / old, round by round."""
  return spread([after / before for before, after in zip(old, new, strict=True)])


# ----------------------------------------------------------------------------------------- rounds


def order(round_number: int, sides: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
  """A B, B A, A B, ..."""
  return sides if round_number % 2 == 0 else sides[::-1]


def rounds(
  job: Job, sides: tuple[Tree, Tree], options: Options, count: int
) -> dict[str, list[Values]]:
  """tree's name -> what was measured in each round, after one that is not counted."""
  found: dict[str, list[Values]] = {side.name: [] for side in sides}
  for side in sides:
    job.prepare(side, options)
  for number in range(-1, count):
    for side in order(number, sides):
      values = job.measure(side, options)
      if number >= 0:
        found[side.name].append(values)
    print(f"  round {number + 1} of {count}", file=sys.stderr, flush=True)
  return found


# ------------------------------------------------------------------------------------------ table


def table(old: list[Values], new: list[Values]) -> Iterator[str]:
  """Lines of markdown. A measure that one tree alone has gets a line too."""
  yield "| measure | old: median (min..max) | new: median (min..max) | new / old (min..max) |"
  yield "| --- | --- | --- | --- |"
  names = dict.fromkeys(name for values in [*old, *new] for name in values)
  for name in names:
    a, b = ([values[name] for values in side if name in values] for side in (old, new))
    both = len(a) == len(b) == len(old)
    shown = _show(ratio(a, b), 1, "{:.3f}") if both else "-"
    yield f"| {name} | {_measured(name, a)} | {_measured(name, b)} | {shown} |"


def _measured(name: str, numbers: list[float]) -> str:
  if not numbers:
    return "-"
  found = spread(numbers)
  if name.endswith("memory"):
    return _show(found, 2**-20, "{:.0f}") + " MiB"
  if found.median >= 1:
    return _show(found, 1, "{:.2f}") + " s"
  return _show(found, 1000, "{:.1f}") + " ms"


def _show(found: Spread, unit: float, form: str) -> str:
  numbers = (found.median, found.low, found.high)
  median, low, high = (form.format(number * unit) for number in numbers)
  return f"{median} ({low}..{high})"


def report(name: str, old: list[Values], new: list[Values]) -> None:
  head = f"\n**{name}**, {len(old)} rounds. {JOBS[name].about}\n"
  print(head, *table(old, new), sep="\n", flush=True)


# ---------------------------------------------------------------------------------------- command


def open_trees(revision: str, work: pathlib.Path) -> tuple[Tree, Tree]:
  trees.unpack(revision, work / "old")
  trees.snapshot(work / "new")
  sides = tuple(Tree(name, work / name, work / f"{name}.scratch") for name in ("old", "new"))
  for side in sides:
    trees.check(side.path)
    side.scratch.mkdir()
  return sides


def main() -> int:
  given = parse()
  revision, options = given.revision, Options(given.config, given.updates, given.blocks)
  try:
    with trees.scratch() as work:
      sides = open_trees(revision, work)
      told = {
        "benchmark": "against",
        "old": f"{revision} ({trees.commit(revision)[:12]})",
        "new": trees.name_of_working_tree(),
        **sides[1].run("-c", _MACHINE).json(),
        "options": dataclasses.asdict(options),
        "jobs": {},
      }
      print(f"old: {told['old']}; new: {told['new']}")
      print(json.dumps(told["hardware"]), json.dumps(told["versions"]), sep="\n", flush=True)
      for name in given.jobs:
        print(name, file=sys.stderr, flush=True)
        found = told["jobs"][name] = rounds(JOBS[name], sides, options, given.rounds)
        report(name, found["old"], found["new"])
        if given.out:  # after each job: hours are not lost to the last one
          given.out.write_text(json.dumps(told, indent=2) + "\n")
  except trees.TreeError as error:
    print("error:", error, file=sys.stderr)
    return 2
  return 0


def parse() -> argparse.Namespace:
  head = __doc__.split("\n\n")[0]
  parser = argparse.ArgumentParser("python -m benchmarks.against", description=head)
  flag, known = parser.add_argument, ",".join(JOBS)
  flag("revision", help="of git: the old tree")
  flag("--jobs", default="start,smoke", help=f"of {known}; default: %(default)s")
  flag("--rounds", type=int, default=4, help="an even number treats both alike; default: 4")
  flag("--out", type=pathlib.Path, help="a file for every number of every round, as JSON")
  flag("--config", default="shapes.py", help="of job train, in experiments/; default: %(default)s")
  flag("--updates", type=int, default=10, help="of each stage in job train; default: 10")
  flag("--blocks", type=int, default=200, help="in job stream; default: 200")
  given = parser.parse_args()
  given.jobs = given.jobs.split(",")
  for name in given.jobs:
    if name not in JOBS:
      parser.error(f"--jobs: there is no {name!r}; there is {known}")
  if given.rounds < 1:
    parser.error(f"--rounds={given.rounds}: expected at least 1")
  return given


if __name__ == "__main__":
  sys.exit(main())
