"""Breaks what people hand in, and reads it as commands, the page and Python do:

    python -m benchmarks.fuzz --seed=0 --minutes=5
    python -m benchmarks.fuzz --seed=0 --kinds=run --case=17

Uploads, videos, pictures, lists of prompts, timelines, captions, values of a config, runs with
their checkpoints, streams that were saved, weights in one file, in shards and of torch.save: bytes
are flipped, cut, doubled and spliced, numbers in headers replaced, texts filled with what texts
should not hold; and functions are called with arguments of odd types and values. Each case is drawn
by (seed, kind, number) and may be read, or refused in one line. A traceback, a dead process, more
than a minute, or memory that grows by more than a GiB is a finding: it is printed with the command
that repeats it, and the status is 1.
"""

import argparse
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]
NAMES = (
  "captions",
  "config",
  "picture",
  "prompts",
  "python",
  "run",
  "shards",
  "stream",
  "timeline",
  "torch",
  "upload",
  "video",
  "weights",
)
SECONDS = 60.0  # that a case may take
MEMORY = 1024.0  # MiB that the process of the readers may grow by in one case
START = 120.0  # seconds until a new process has imported everything and made what is right


class Reader:
  """A worker, started anew when it has died or hangs."""

  def __init__(self, module: str = "benchmarks.fuzz.kinds"):
    self._module, self._process, self._mib = module, None, 0.0

  def read(self, name: str, seed: int, number: int, seconds: float) -> dict:
    """Returns the worker's answer; outcome `dead`, `hangs` or `memory` where it has none or took
    too much.
    """
    if self._process is None:
      self._start()
    first = name not in self._kinds
    allowed = seconds + (START if first else 0.0)
    try:
      self._process.stdin.write(json.dumps([name, seed, number]) + "\n")
      self._process.stdin.flush()
      answer = self._answers.get(timeout=allowed)
    except queue.Empty:
      self.close()
      return {"outcome": "hangs", "what": f"more than {seconds:g} seconds"}
    except BrokenPipeError:
      answer = None
    if answer is None:
      status = self._process.wait()
      self.close()
      return {"outcome": "dead", "what": f"status {status}"}
    answer = json.loads(answer)
    grown, self._mib = answer["mib"] - self._mib, answer["mib"]
    self._kinds.add(name)
    if not first and answer["outcome"] in ("read", "refused") and grown > MEMORY:
      return {**answer, "outcome": "memory", "what": f"{grown:.0f} MiB more"}
    return answer

  def _start(self) -> None:
    # whatever a process that is killed leaves lies here
    self._folder = tempfile.TemporaryDirectory(prefix="fuzz_")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": self._folder.name}
    self._process = subprocess.Popen(
      [sys.executable, "-m", self._module],
      cwd=ROOT,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    self._answers, self._kinds, self._mib = queue.Queue(), set(), 0.0
    lines, answers = self._process.stdout, self._answers

    def listen():
      for line in lines:
        answers.put(line)
      answers.put(None)

    threading.Thread(target=listen, daemon=True).start()

  def close(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None
      self._folder.cleanup()


def fuzz(
  names, seed: int, first: int, seconds: float, reader: Reader, limit: float = SECONDS
) -> tuple[dict, list[str]]:
  """Reads case after case of each kind in turn, from number `first` on, for as long as `seconds`,
  one of each at least. Returns ({kind: {outcome: times}}, findings).
  """
  counts = {name: {} for name in names}
  findings, end, number = [], time.monotonic() + seconds, first
  while number == first or time.monotonic() < end:
    for name in names:
      answer = reader.read(name, seed, number, limit)
      outcome = answer["outcome"]
      counts[name][outcome] = counts[name].get(outcome, 0) + 1
      if outcome not in ("read", "refused"):
        command = f"python -m benchmarks.fuzz --seed={seed} --kinds={name} --case={number}"
        findings.append(f"{name}: {outcome}\n  {command}\n{answer['what']}")
        print(findings[-1], flush=True)
    number += 1
  return counts, findings


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fuzz",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--minutes", type=float, default=5.0)
  parser.add_argument("--kinds", default=",".join(NAMES), help="comma-separated")
  parser.add_argument("--case", type=int, help="this one alone")
  told = parser.parse_args(argv)
  names = told.kinds.split(",")
  if unknown := set(names) - set(NAMES):
    parser.error(f"--kinds: {', '.join(sorted(unknown))}; expected some of {', '.join(NAMES)}")
  reader = Reader()
  try:
    first, seconds = (0, 60 * told.minutes) if told.case is None else (told.case, 0.0)
    counts, findings = fuzz(names, told.seed, first, seconds, reader)
  finally:
    reader.close()
  for name, outcomes in counts.items():
    print(name, ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
  print(f"{len(findings)} findings")
  return 1 if findings else 0


if __name__ == "__main__":
  sys.exit(main())
