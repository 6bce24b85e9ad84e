"""Lowers every program of every experiment at full size, and says what it is by two digests.

    python -m benchmarks.programs                                each, with its seconds
    python -m benchmarks.programs --out=FILE --full              kept, with all operations
    python -m benchmarks.programs --compare=FILE                 what differs from what was kept
    python -m benchmarks.programs --only='shapes:smoke/*'        of these alone
    python -m benchmarks.programs --detail=shapes/teacher/step   the operations of one

Before a change that should change no number: --out=FILE --full; after it: --compare=FILE. Nothing
is compiled and no weights are allocated. digest.py says what is a difference, and what is none.
tests/benchmarks/test_programs.py compares with tests/golden_programs/<version of jax>.json.
"""

import argparse
import pathlib
import sys

import jax

from benchmarks.programs import recording


def main(arguments: list[str] | None = None) -> int:
  """The exit status: 1 where something differs from the file of --compare."""
  options = parse(arguments)
  jax.config.update("jax_platforms", "cpu")  # each platform lowers in its own way
  pattern, kept, total = options.detail or options.only, {}, 0.0
  for found in recording.find(pattern):
    kept[found.name] = recording.entry(found.digest)
    total += found.seconds
    cost = f"the same as {found.same}" if found.same else f"{found.seconds:.2f} s"
    said = f"{found.digest.size} operations, {found.digest.operations}, {cost}"
    print(f"{found.name}: {said}", flush=True)
  if not kept:
    sys.exit(f"no program has a name like {pattern}; without --only all are listed")
  print(f"{len(kept)} programs in {total:.0f} s", file=sys.stderr)
  if options.detail:
    for line, count in kept[options.detail]["counts"].items():
      print(f"{count:6d} {line}")
  if options.out:
    recording.write(options.out, kept if options.full else recording.short(kept))
  return differs(options.compare, pattern, kept) if options.compare else 0


def differs(path: pathlib.Path, pattern: str, kept: recording.Recording) -> int:
  """Says what does."""
  versions, before = recording.read(path)
  if versions != recording.versions():
    print(f"made with {versions}, here are {recording.versions()}: these lower otherwise")
  lines = recording.compare(recording.matching(before, pattern), kept)
  print("\n".join(lines) or f"nothing differs from {path}")
  return 1 if lines else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
  command, about = "python -m benchmarks.programs", __doc__.split("\n")[0]
  parser = argparse.ArgumentParser(command, description=about)
  parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
  parser.add_argument("--full", action="store_true", help="with --out: with every operation")
  parser.add_argument("--compare", type=pathlib.Path, help="a file that --out wrote")
  parser.add_argument(
    "--only", default="*", help="a pattern of names, as 'hiar_wan_1_3b/distill/*'"
  )
  parser.add_argument("--detail", help="the name of a program")
  return parser.parse_args(arguments)


if __name__ == "__main__":
  sys.exit(main())
