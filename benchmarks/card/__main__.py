"""What one card does with Wan2.1 at its true sizes, in under eight minutes, with random weights:

    python -m benchmarks.card --out=card.json

    attention   forms of attention, time and error against float32
    network     the 1.3B network: a block, a pair of blocks, a clip
    rollouts    whole videos of 21 latent frames at 480x832, as HiAR, Self-Forcing and SAF; a stream
    decoders    Wan2.1's VAE and TAEHV
    updates     training updates of one clip, up to the published generator's with a 14B teacher

It needs jax, flax, optax, jaxtyping and beartype, no data and no weights. A part is a process of
its own, so that one which fails or outlasts --seconds (for all parts together) leaves the others;
so is a program within a part: what failed stands under "error", in its place. Prints a line a
program and writes one JSON object, anew after each part:

    compile_s     compiling alone, of programs that were compiled side by side
    run_s         median of the runs after the first, each waited for
    temp_bytes    what the compiled program allocates beside arguments and results
    peak_bytes    the card's peak so far in the process of the part
    tflop         needed arithmetic (matrix products, hidden keys not counted); tflop_per_s with it

--size=small is a rehearsal, for a CPU.
"""

import argparse
import datetime
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.card.sizes import SIZES

PARTS = ("attention", "network", "rollouts", "decoders", "updates")


def run_part(name: str, size: str, only: str, seconds: float) -> dict:
  """Runs a part in a process of its own; returns its report, or {"error": why there is none}."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "part.json"
    command = [sys.executable, "-m", "benchmarks.card", f"--part={name}", f"--size={size}"]
    command += [f"--only={only}", f"--out={out}", f"--seconds={seconds}"]
    start, error = time.perf_counter(), None
    try:
      code = subprocess.run(command, timeout=max(seconds, 1.0), check=False).returncode
      error = f"ended with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
      error = f"stopped after {seconds:.0f} s"
    # a part writes after every program, so what it had done is there
    report = json.loads(out.read_text()) if out.exists() else {}
  report["wall_s"] = round(time.perf_counter() - start, 1)
  return report | ({"error": error} if error else {})


def part(args: argparse.Namespace) -> None:
  """Is the process of one part."""
  from benchmarks import machine  # noqa: PLC0415  # the parent must not take the card
  from benchmarks.card.programs import run  # noqa: PLC0415

  module = importlib.import_module(f"benchmarks.card.{args.part}")
  programs = [p for p in module.programs(SIZES[args.size]) if args.only in p.name]
  report = {"hardware": machine.hardware(), "versions": machine.versions(), "programs": {}}
  for name, found in run(programs, args.seconds):
    report["programs"][name] = found
    args.out.write_text(json.dumps(report))
    print(line(args.part, name, found), flush=True)


def line(part_name: str, name: str, found: dict) -> str:
  """Returns a program's line of the table."""
  text = f"{part_name:<10} {name:<44}"
  if "error" in found:
    return f"{text} {found['error'][:200]}"
  for key, unit, scale in (
    ("run_s", "ms", 1e3),
    ("tflop_per_s", "TFLOP/s", 1),
    ("frames_per_s", "frames/s", 1),
    ("temp_bytes", "GiB temp", 2**-30),
    ("peak_bytes", "GiB peak", 2**-30),
    ("compile_s", "s compile", 1),
  ):
    if found.get(key) is not None:
      text += f" {found[key] * scale:9.2f} {unit}"
  errors = {key: value for key, value in found.items() if key.endswith("_error")}
  return text + "".join(f"  {key} {value:.1e}" for key, value in errors.items())


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file")
  parser.add_argument("--size", choices=SIZES, default="wan")
  parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by commas")
  parser.add_argument("--only", default="", help="programs whose name holds this")
  parser.add_argument("--seconds", type=float, default=450.0, help="for all parts together")
  parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.part:
    part(args)
    return 0
  names = args.parts.split(",")
  if not set(names) <= set(PARTS):
    parser.error(f"--parts={args.parts}: expected some of {', '.join(PARTS)}")
  date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  report = {"benchmark": "card", "date": date, "size": args.size, "parts": {}}
  end = time.monotonic() + args.seconds
  for left, name in zip(range(len(names), 0, -1), names, strict=True):
    # half as much again as an equal share of what is left, so that no part takes all
    seconds = (end - time.monotonic()) * min(1.0, 1.5 / left)
    report["parts"][name] = run_part(name, args.size, args.only, seconds)
    args.out.write_text(json.dumps(report, indent=2))
    print(f"{name}: {report['parts'][name].get('error', 'done')}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
