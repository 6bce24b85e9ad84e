"""A program compiled for its devices, and what its compiler says of it: one row of a plan.

Compiling takes minutes where lowering takes seconds, so rows are kept as small files, named by a
digest of the lowered program, the devices and the compiler.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax

from hiar_jax.errors import UserError
from hiar_jax.files import write_atomic
from hiar_jax.planning import collectives
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.collectives import Collective, Found
from hiar_jax.planning.programs import Program, operations
from hiar_jax.planning.targets import Target

SPARE = 0.1  # of the memory, for what the compiler does not count
FORMAT = 1  # of the files; another one is made anew
_REFUSED = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A lowered program with its digest. seconds: it took."""

  program: Program
  lowered: jax.stages.Lowered
  digest: str
  seconds: float


def find(
  run: AbstractRun,
  name: str,
  make: Callable[[AbstractRun], Program],
  target: Target,
  cache: pathlib.Path | None = None,
  compile: bool = True,
) -> Row | None:
  """Returns the row of the program that make(run) is, kept in `cache` or made; None where it is not
  kept and not to be made. Says on stderr what it compiles.

  Raises UserError where the network cannot run on such devices.
  """
  if why := run.experiment.dit.unavailable_on(target.devices[0].platform):
    raise UserError(f"{name} on {target.name} cannot be planned: {why}")
  found = lower(make(run), target)
  path = cache and cache / f"{name}-{found.digest}.json"
  if path and path.is_file():
    return json.loads(path.read_text())
  if not compile:
    return None
  print(f"{name} on {target.name}: compiling", file=sys.stderr, flush=True)
  row = _made(name, found, target, operations(run, make))
  if path:
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(row, indent=1) + "\n").encode())
  return row


def lower(program: Program, target: Target) -> Lowered:
  """Returns the program as its compiler is given it."""
  start = time.perf_counter()
  lowered = program.lower()
  seconds = time.perf_counter() - start
  said = hashlib.sha256(lowered.as_text().encode())
  for part in (FORMAT, target.name, target.compiler, jax.__version__, program.turns):
    said.update(f"\n{part}".encode())
  return Lowered(program, lowered, said.hexdigest()[:32], seconds)


def _made(name: str, found: Lowered, target: Target, flops: float) -> Row:
  """Compiles a lowered program. flops: those of one call.

  A program that its compiler refuses for its memory has a row too, with the compiler's words.
  """
  program = found.program
  row = {
    "program": name,
    "on": target.name,
    "devices": program.mesh.size,
    "mesh": {axis: size for axis, size in program.mesh.shape.items()},
    "clips": program.clips,
    "memory": target.memory,
    "parts": {part: program.bytes_of(part) for part in program.arguments},
    "flops": flops,
    "lower_s": round(found.seconds, 1),
    "versions": {"jax": jax.__version__, "compiler": target.compiler},
  }
  start = time.perf_counter()
  try:
    executable = found.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not any(word in str(error) for word in _REFUSED):
      raise
    row |= {"fits": False, "refused": _words(str(error))}
    executable = None
  row["compile_s"] = round(time.perf_counter() - start, 1)
  if executable is not None:
    row |= _memory(executable, target.memory)
    row |= _traffic(collectives.read(executable.as_text(), row["mesh"], program.turns), row)
  row["seconds"] = _seconds(row, target)
  return row


def _memory(executable: jax.stages.Compiled, limit: int | None) -> Row:
  """Bytes of one device. A result that takes the place of a donated argument costs nothing."""
  m = executable.memory_analysis()
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  total = m.argument_size_in_bytes + m.temp_size_in_bytes + outputs
  fits = {} if limit is None else {"fits": total <= (1 - SPARE) * limit, "left": limit - total}
  return {
    "arguments": m.argument_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "outputs": outputs,
    **fits,
  }


def _traffic(found: Found, row: Row) -> Row:
  """What the program exchanges. over_the_batch: results that lead with all of its examples."""
  kinds: dict[tuple[str, str, int], list[float]] = {}
  for one, times in found.calls:
    entry = kinds.setdefault((one.kind, "+".join(one.axes) or "-", one.group), [0, 0])
    entry[0] += times
    entry[1] += times * one.moved
  largest = max((one for one, _ in found.calls), key=lambda one: one.size, default=None)
  whole = [one for one, _ in found.calls if row["devices"] > 1 and _holds_batch(one, row["clips"])]
  return {
    "collectives": [
      {"kind": kind, "axes": axes, "group": group, "calls": calls, "moved": moved}
      for (kind, axes, group), (calls, moved) in sorted(kinds.items())
    ],
    "largest": largest and {"kind": largest.kind, "result": largest.result, "bytes": largest.size},
    "over_the_batch": sorted({f"{one.kind} {one.result}" for one in whole}),
    "kernels": found.kernels,
  }


def _holds_batch(one: Collective, clips: int) -> bool:
  """True where all examples are in front, perhaps with two of a modulation's rows each."""
  # an activation has its examples and two axes more; what begins so with fewer may be weights
  return clips > 1 and any(
    len(sizes) > 2 and sizes[0] in (clips, 2 * clips) for _, sizes in one.shapes
  )


def _seconds(row: Row, target: Target) -> Row:
  """A roofline of stated peaks: no program is faster on these devices."""
  chip = target.chip
  if chip is None:
    return {}
  found = {"arithmetic": row["flops"] / row["devices"] / chip.flops}
  if "collectives" in row:
    found["communication"] = sum(
      _link_seconds(one, row["mesh"], target) for one in row["collectives"]
    )
  return found


def _link_seconds(one: Row, mesh: dict[str, int], target: Target) -> float:
  chip = target.chip
  if not chip.network or target.host >= len(target.devices):
    return one["moved"] / chip.link
  # Devices lie host by host, and the last axis of a mesh varies fastest: a group has as many of a
  # host as its inner axes hold. What comes from other hosts they share among their network cards.
  stride, together, size = 1, 1, one["group"]
  for axis, length in reversed(mesh.items()):
    if axis in one["axes"].split("+"):
      together *= max(1, min(length, target.host // max(stride, 1)))
    stride *= length
  together = max(1, min(together, size))
  hosts = max(1, size // together)
  outside = one["moved"] * (hosts - 1) / hosts * size / max(size - 1, 1)
  return max(one["moved"] / chip.link, outside / together / chip.network)


def _words(text: str) -> str:
  """Returns the compiler's own words: total, limit and the largest buffers."""
  lines = [line.rstrip() for line in text.splitlines() if line.strip()]
  lines = [line for line in lines if not re.match(r"\s*(=+|\.+)\s*$", line)]
  return "\n".join(lines)[:4000]
