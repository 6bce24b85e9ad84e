"""How far it is from a command to the network, and how many files a caption and a prompt pass.

    python -m benchmarks.walks           # a table
    python -m benchmarks.walks --list    # and the files in order, the climbs, the deepest stacks

A tiny run of the shapes world is trained until the generator's step has been traced; then a video
is generated and one is streamed, each in a process of its own under a profile hook (`walk_hook`).

depth   frames of the package on Python's stack between an entry point's `main` and the network's
        `Module.apply` (flax), at the first and at the deepest call. A stream calls its network in
        a thread: there, all frames of the thread.
files   those with a function that is given the text or something made of it, that returns it, or
        to which it is returned. Of a caption: the string, its ids and embeddings, from where it is
        made or read to the loss. Of a prompt: those, the latents (noise included) and the frames,
        to the mp4. A function is also given what its closure, a method's object or a partial
        holds. What happens inside `Module.apply` is the network's own and is not followed.
climbs  calls of these functions that go up: the function lies on a higher floor than the one of the
        package that called it, itself or through a library (a callback). A pair of functions counts
        once. `taken`: how many of these are a generator's values taken by a lower file.

Floors come from the imports: a top-level module or subpackage stands one above the highest that it
imports, and within a subpackage the same holds of its modules.

No module, class or function of the package is named here, so that a count before and one after a
renaming compare: text, latents and frames are recognised by sizes that nothing else in the run has,
stages by their batch sizes. It relies on the commands train, generate and stream, on a function
`main` in each, and on the names in the config.
"""

import argparse
import ast
from collections.abc import Iterable
from concurrent import futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.walk_hook import different_phases

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "hiar_jax"
PROMPT = "a circle moving left, red"  # no world makes it: wherever it is, it comes from the command
TEXT, CHANNELS, SIDE, PATCH, CLIPS = 13, 7, 40, 8, 10  # see walk_hook.Sizes
BATCHES = {"teacher": 3, "trajectories": 4, "causal_init": 5, "distill": 6, "sample": 2}
TINY = {
  "data.clips": CLIPS,
  "data.size": SIDE,
  "data.frames": 4,
  "history.block": 2,
  "history.window": 4,
  "codec.patch": PATCH,
  "codec.channels": CHANNELS,
  "text.dim": 11,
  "text.length": TEXT,
  "model.dim": 16,
  "model.ffn_dim": 16,
  "model.num_layers": 1,
  "model.num_heads": 1,
  "model.freq_dim": 16,
  "teacher.steps": 1,
  "trajectories.count": 6,
  "trajectories.steps": 4,
  "causal_init.steps": 1,
  "distill.steps": 2,
  "distill.critic_updates": 1,
  "distill.critic_warmup": 1,  # the critic's step is the first to be traced
  "sample.count": 2,
  "sample.measure": 2,
  "log.every": 1,
  **{f"{stage}.batch": batch for stage, batch in BATCHES.items()},
}

Function = tuple[str, str]  # file, name
Floor = tuple[int, int]  # of the top-level module or subpackage; of the module within it


# ------------------------------------------------------------------------------------------ floors


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
  """Module -> the package's modules that it imports, at its top or inside its functions."""
  files = {}
  for path in package.rglob("*.py"):
    files[module_of(path.relative_to(package.parent).as_posix())] = path
  return {name: imports_of(path, files.keys()) - {name} for name, path in files.items()}


def module_of(file: str) -> str:
  """hiar_jax/models/dit.py -> hiar_jax.models.dit"""
  return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: pathlib.Path, modules: Iterable[str]) -> set[str]:
  """Those of `modules` that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
      found |= submodules or {node.module}
  return found & set(modules)


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
  """1 where nothing is imported, else one above the highest import; a circle shares one level."""
  reached = {name: set(graph[name]) for name in graph}
  for through in graph:
    for name in graph:
      if through in reached[name]:
        reached[name] |= reached[through]

  @functools.cache
  def level(name: str) -> int:
    below = [other for other in reached[name] if name not in reached[other]]
    return 1 + max(map(level, below), default=0)

  return {name: level(name) for name in graph}


def floors(graph: dict[str, set[str]]) -> dict[str, Floor]:
  """Module -> its floor; see the module's docstring."""
  part = lambda module: ".".join(module.split(".")[:2])
  parts = {part(name): set() for name in graph}
  for name, imported in graph.items():
    parts[part(name)] |= {part(other) for other in imported} - {part(name)}
  of_part, found = levels(parts), {}
  for one in parts:
    inside = {name for name in graph if part(name) == one}
    for name, level in levels({name: graph[name] & inside for name in inside}).items():
      found[name] = (of_part[one], level)
  return found


def climbs_up(caller: Function, callee: Function, floor: dict[str, Floor]) -> bool:
  """Whether a call goes to a higher floor; within a subpackage its modules' floors count."""
  below, above = module_of(caller[0]), module_of(callee[0])
  if below.split(".")[:2] == above.split(".")[:2]:
    return floor[below][1] < floor[above][1]
  return floor[below][0] < floor[above][0]


# ------------------------------------------------------------------------------------------- walks


def walk(calls: list[dict], floor: dict[str, Floor]) -> dict:
  """The files in order and the climbs of calls as walk_hook.Recorder.report has them.

  {files: [(file, its first function that has the text, kinds)], climbs: [(caller, callee, taken)]}
  """
  first: dict[str, tuple] = {}
  kinds: dict[str, set[str]] = {}
  climbs = {}

  def has_it(function: Function, found: dict[str, int]) -> None:
    file = function[0]
    kinds.setdefault(file, set()).update(kind.partition(":")[0] for kind in found)
    first[file] = min(first.get(file, (sys.maxsize,)), (min(found.values()), function[1]))

  for call in calls:
    caller, callee = call["caller"] and tuple(call["caller"]), tuple(call["callee"])
    given, returned = call["given"], call["returned"]
    for function, found in ((callee, given), (callee, returned), (caller, returned)):
      if function and found:
        has_it(function, found)
    if caller and (given or returned) and climbs_up(caller, callee, floor):
      climbs[caller, callee] = call["taken"]
  ordered = sorted(first, key=first.get)
  return {
    "files": [(file, first[file][1], sorted(kinds[file])) for file in ordered],
    "climbs": [(caller, callee, taken) for (caller, callee), taken in climbs.items()],
  }


def depth(applies: list[dict], entry: str) -> dict:
  """Frames between `main` of the file `entry` and the network: {first, deepest, stack}."""
  stacks = []
  for apply in applies:
    frames = [tuple(frame) for frame in apply["frames"]]
    start = frames.index((entry, "main")) + 1 if (entry, "main") in frames else 0
    stacks.append([frame for frame in frames[start:] if frame[1] != "<module>"])
  deepest = max(stacks, key=len)
  return {"first": len(stacks[0]), "deepest": len(deepest), "stack": deepest}


def training(report: dict, floor: dict[str, Floor]) -> tuple[dict, dict]:
  """(depth of each stage's step, walk of a caption to each stage's step and to all of them)."""
  applies, calls = report["applies"], report["calls"]
  depths, walks, everything = {}, {}, []
  for stage in ("teacher", "causal_init", "distill"):
    groups = different_phases(applies, BATCHES[stage])
    if not groups:
      batches = sorted({apply["batch"] for apply in applies})
      raise RuntimeError(
        f"{stage}: no network was applied to {BATCHES[stage]} clips, but {batches}"
      )
    names = [stage] if len(groups) == 1 else [f"{stage} {i + 1}" for i in range(len(groups))]
    if stage == "distill" and len(groups) == 2:
      names = ["critic", "generator"]
    for name, phases in zip(names, groups, strict=True):
      of_step = [apply for apply in applies if apply["phase"] in phases]
      depths[f"{name} step"] = depth(of_step, f"{PACKAGE}/train.py")
    # Other texts are under way too, those of previews, in batches of their own.
    own = {"prompt", *(f"text:{rows}" for rows in (1, BATCHES[stage], CLIPS))}
    phases = sum(groups, [])
    of_stage = [only(call, own) for call in calls if call["phase"] in phases]
    walks[f"caption to {stage}"] = walk(of_stage, floor)
    everything += of_stage
  walks["caption to all three"] = walk(everything, floor)
  return depths, walks


def only(call: dict, kinds: set[str]) -> dict:
  """A call as if no other kinds had been seen in it."""
  keep = lambda side: {kind: order for kind, order in call[side].items() if kind in kinds}
  return {**call, "given": keep("given"), "returned": keep("returned")}


# ----------------------------------------------------------------------------------------- the runs


def record(module: str, arguments: list[str], out: pathlib.Path, **asked) -> dict:
  """What walk_hook saw of one command. Raises RuntimeError where the command fails."""
  latents = (SIDE // PATCH, SIDE // PATCH, CHANNELS)
  request = {
    "module": f"{PACKAGE}.{module}",
    "arguments": arguments,
    "out": str(out),
    "sizes": {"text": TEXT, "latents": latents, "frame": SIDE},
    **asked,
  }
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # unset, a command starts itself anew, unwatched
  }
  command = [sys.executable, "-m", "benchmarks.walk_hook", json.dumps(request)]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{module} failed, status {done.returncode}:\n{done.stderr[-4000:]}")
  return json.loads(out.read_text())


def measure(directory: pathlib.Path) -> dict:
  """{depths, walks}; the runs are made in `directory`."""
  workdir, report = directory / "run", lambda name: directory / f"{name}.json"
  arguments = ["--config=experiments/shapes.py:smoke", f"--workdir={workdir}"]
  arguments += [f"--config.{name}={value}" for name, value in TINY.items()]
  asked = {"captions": str(workdir / "data"), "until": (BATCHES["distill"], 2)}
  trained = record("train", arguments, report("train"), **asked)
  arguments = [f"--workdir={workdir}", "--stage=causal_init", f"--prompt={PROMPT}"]
  videos = {
    "generate": [f"--out={directory}/clip.mp4"],
    "stream": [f"--out={directory}/stream.mp4", "--frames=8"],
  }
  run = lambda name: record(name, [*arguments, *videos[name]], report(name), prompts=[PROMPT])
  with futures.ThreadPoolExecutor(2) as pool:
    reports = dict(zip(videos, pool.map(run, videos), strict=True))
  floor = floors(import_graph(ROOT / PACKAGE))
  depths, walks = training(trained, floor)
  for name, found in reports.items():
    depths[name] = depth(found["applies"], f"{PACKAGE}/{name}.py")
    walks[f"prompt to {name}"] = walk(found["calls"], floor)
  return {"depths": depths, "walks": walks}


def table(found: dict, listed: bool) -> str:
  """What main prints. listed: with every file, climb and frame."""
  lines = [f"{'frames between main and the network':<38}{'first':>7}{'deepest':>9}{'files':>7}"]
  for name, one in found["depths"].items():
    files = len({file for file, _ in one["stack"]})
    lines.append(f"  {name:<36}{one['first']:>7}{one['deepest']:>9}{files:>7}")
    lines += [f"      {file}: {function}" for file, function in one["stack"] if listed]
  lines.append(f"\n{'walks':<38}{'files':>7}{'climbs':>9}{'taken':>7}")
  for name, one in found["walks"].items():
    taken = sum(climb[2] for climb in one["climbs"])
    lines.append(f"  {name:<36}{len(one['files']):>7}{len(one['climbs']):>9}{taken:>7}")
    if listed:
      for file, function, kinds in one["files"]:
        lines.append(f"      {file}: {function} ({', '.join(kinds)})")
      for caller, callee, is_taken in one["climbs"]:
        verb = "takes from" if is_taken else "calls up to"
        lines.append(f"      {': '.join(caller)} {verb} {': '.join(callee)}")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--list", action="store_true", help="with the files, climbs and stacks")
  parser.add_argument("--out", type=pathlib.Path, help="write everything as JSON")
  options = parser.parse_args()
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    found = measure(pathlib.Path(directory))
  print(table(found, options.list))
  print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
  if options.out:
    options.out.write_text(json.dumps({"benchmark": "walks", **found}, indent=2) + "\n")


if __name__ == "__main__":
  main()
