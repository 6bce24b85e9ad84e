"""Digests of the programs, kept in a file: made, written, read and compared."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import fnmatch
import gc
import importlib.metadata
import json
import pathlib
import time

from benchmarks.programs import digest, full_size, listing
from benchmarks.programs.digest import Digest

PACKAGES = ("jax", "jaxlib", "flax", "optax")  # another version of one may lower otherwise
SHOWN = 12  # operations of a difference
PRODUCTS = ("stablehlo.dot_general", "stablehlo.convolution")

Recording = Mapping[str, Mapping]  # name -> what `entry` makes


@dataclasses.dataclass(frozen=True)
class Found:
  """name: experiment/program. seconds: it took; same: the name of the same one, found before."""

  name: str
  digest: Digest
  seconds: float
  same: str = ""


_FOUND: dict[str, Found] = {}  # by listing.programs' key


def find(pattern: str = "*") -> Iterator[Found]:
  """The programs whose names match. One that several experiments have is lowered once."""
  for config, e in full_size.experiments().items():
    for program, key, lower in listing.programs(e):
      name = f"{config}/{program}"
      if not fnmatch.fnmatchcase(name, pattern):
        continue
      if key in _FOUND:
        yield dataclasses.replace(_FOUND[key], name=name, seconds=0.0, same=_FOUND[key].name)
        continue
      start = time.perf_counter()
      with no_collection():
        found = digest.of_lowered(lower())
      _FOUND[key] = Found(name, found, time.perf_counter() - start)
      yield _FOUND[key]


@contextlib.contextmanager
def no_collection():
  """Looking for garbage among the many objects of a trace takes a quarter of the time."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def entry(found: Digest) -> dict:
  """As it is kept, in full: operations says how many, counts how often each; products is a digest
  of the matrix products and convolutions alone, where the time goes.
  """
  return {
    "digest": found.operations,
    "dataflow": found.dataflow,
    "products": digest.of_lines(
      f"{count} x {line}"
      for line, count in sorted(found.counts.items())
      if any(name in line for name in PRODUCTS)
    ),
    "operations": found.size,
    "counts": dict(sorted(found.counts.items())),
  }


def short(programs: Recording) -> Recording:
  """Without the counts."""
  return {
    name: {key: value for key, value in kept.items() if key != "counts"}
    for name, kept in programs.items()
  }


def matching(programs: Recording, pattern: str) -> Recording:
  return {name: kept for name, kept in programs.items() if fnmatch.fnmatchcase(name, pattern)}


def write(path: pathlib.Path, programs: Recording) -> None:
  """One line a program, so that a change of one is a line of a diff."""
  lines = [f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in programs.items()]
  inner = ",\n".join(lines)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{{"versions": {json.dumps(versions())},\n"programs": {{\n{inner}\n}}}}\n')


def read(path: pathlib.Path) -> tuple[dict[str, str], Recording]:
  """(versions, programs)."""
  kept = json.loads(path.read_text())
  return kept["versions"], kept["programs"]


def compare(before: Recording, after: Recording) -> list[str]:
  """A line for each program that differs, and for operations that came or went where both tell."""
  lines = []
  for name in sorted(before.keys() | after.keys()):
    old, new = before.get(name), after.get(name)
    if old is None or new is None:
      lines.append(f"{name}: {'is new' if old is None else 'is gone'}")
    elif (old["digest"], old["dataflow"]) != (new["digest"], new["dataflow"]):
      lines.append(f"{name}: {_difference(old, new)}")
      if "counts" in old and "counts" in new:
        lines += _changes(old["counts"], new["counts"])
  return lines


def _difference(old: Mapping, new: Mapping) -> str:
  if old["digest"] == new["digest"]:
    return "the operations are the same, but feed each other otherwise"
  count = f"{old['operations']} -> {new['operations']} operations"
  if "products" in old and "products" in new:
    count += ", the same matrix products" * (old["products"] == new["products"])
  if old["dataflow"] == new["dataflow"]:
    return f"{count}; the results are computed as before, others came, went or are repeated"
  return f"{count}; the results are computed otherwise"


def _changes(old: Mapping[str, int], new: Mapping[str, int]) -> list[str]:
  changes = {line: new.get(line, 0) - old.get(line, 0) for line in sorted(old.keys() | new.keys())}
  lines = [f"  {change:+d} {line}" for line, change in changes.items() if change]
  more = len(lines) - SHOWN
  return [*lines[:SHOWN], f"  and {more} more"] if more > 0 else lines
