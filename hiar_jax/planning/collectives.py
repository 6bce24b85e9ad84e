"""What a compiled program moves between devices and which kernels it calls, read from its text.

The text is XLA's HLO after partitioning, the program of one device. A loop's body is counted as
often as the loop turns; a loop whose length is not known before the program runs turns a number of
times that the caller says. Of branches the one that moves most counts.
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
import math
import re

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)[ (].*\{\s*$")
_INSTRUCTION = re.compile(
  r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) "
  rf"({'|'.join(KINDS)}|while|conditional|call|fusion|async|custom-call)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLEE = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SIDES = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TURNS = re.compile(r'"?known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)"?\}')
_KERNEL = re.compile(r'custom_call_target="([^"]*)"')
_OF_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_AXIS = r"'([^']*)'(?::\((\d+)\)(\d+))?"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, sizes) of each array
KERNELS = ("cudnn", "tpu_custom_call")  # parts of their targets


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange. shapes: of its result on one device; size: the result's bytes; moved: bytes that
  a device receives; axes: those of the mesh that it goes over; group: devices that exchange.
  """

  kind: str
  shapes: Shapes
  size: int
  moved: float
  axes: tuple[str, ...]
  group: int

  @property
  def result(self) -> str:
    """As bf16[64,21,1560]."""
    return " ".join(f"{dtype}[{','.join(map(str, sizes))}]" for dtype, sizes in self.shapes)


@dataclasses.dataclass(frozen=True)
class Found:
  """calls: each collective with its number of executions. kernels: calls in the text, by target."""

  calls: tuple[tuple[Collective, float], ...]
  kernels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Computation:
  """collectives: its own. calls: (names of which one is run, times)."""

  collectives: list[Collective]
  calls: list[tuple[tuple[str, ...], float]]


def read(text: str, mesh_shape: dict[str, int], turns: float = 1.0) -> Found:
  """Returns what a compiled program of a mesh (axis -> size) exchanges.

  turns: of loops of unknown length.
  """
  computations, entry, kernels = _parse(text, mesh_shape, turns)
  calls: Counter[Collective] = Counter()
  for collective, times in _walk(computations, entry, {}):
    calls[collective] += times
  return Found(tuple(calls.items()), dict(kernels))


def _walk(computations: dict[str, _Computation], name: str, seen: dict) -> list:
  """Returns [(collective, times)] of one run of a computation."""
  if name not in seen:
    seen[name] = []
    own = computations.get(name, _Computation([], []))
    found = Counter({one: own.collectives.count(one) for one in own.collectives})
    for names, times in own.calls:
      sides = [_walk(computations, side, seen) for side in names]
      most = max(sides, key=lambda side: sum(one.moved * count for one, count in side))
      for one, count in most:
        found[one] += times * count
    seen[name] = list(found.items())
  return seen[name]


def _parse(text: str, mesh: dict[str, int], turns: float) -> tuple[dict, str, Counter]:
  """Returns the computations by name, the name of the first, and the kernels."""
  computations, entry, kernels = {}, "", Counter()
  conditions, loops, current = {}, [], None
  for line in text.splitlines():
    if line[:1] not in (" ", "}", "", "H") and (header := _HEADER.match(line)):
      current = computations[header[2]] = _Computation([], [])
      # a TPU's fused sum of which each device keeps its part
      kept = line.rpartition("->")[2] if header[2].startswith("all-reduce-scatter") else ""
      conditions[header[2]] = constants = []
      entry = header[2] if header[1] else entry
      continue
    if current is None:
      continue
    if " constant(" in line and (
      number := re.search(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)", line)
    ):
      constants.append(int(number[1]))
    if not (match := _INSTRUCTION.match(line)):
      continue
    kind = match[2]
    if kind in KINDS:
      one = _collective(line, match, mesh)
      current.collectives.append(_scattered(one, kept) if kept else one)
    elif kind == "while":
      known = _TURNS.search(line)
      body, condition = (
        re.search(rf"{name}=%?([\w.\-]+)", line)[1] for name in ("body", "condition")
      )
      loops.append((current, body, condition, int(known[1]) if known else None))
    else:
      if kind == "custom-call" and (target := _KERNEL.search(line)):
        kernels.update([target[1]] if any(part in target[1] for part in KERNELS) else [])
      if kind == "conditional":
        branches = _BRANCHES.search(line)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else _SIDES.findall(line)
        current.calls.append((tuple(names), 1.0))
      elif callee := _CALLEE.search(line):
        current.calls.append(((callee[1],), 1.0))
  for owner, body, condition, known in loops:
    # not all compilers say it: a loop that counts to a number compares with it
    bounds = conditions.get(condition, [])
    length = known if known is not None else bounds[0] if len(bounds) == 1 else turns
    owner.calls.append(((body,), length))
  return computations, entry, kernels


def _collective(line: str, match: re.Match, mesh: dict[str, int]) -> Collective:
  kind, started = match[2], bool(match[3])
  arrays = _ARRAY.findall(match[1])
  if started and kind != "all-reduce":  # (operands, results, counters)
    arrays = [array for array in arrays if array != ("u32", "")]
    arrays = arrays[len(arrays) // 2 :]
  shapes = _shapes(arrays)
  size = _size(shapes)
  group, axes = _over(_group(line, math.prod(mesh.values())), mesh)
  n = max(len(group), 1)
  share = (n - 1) / n
  moved = {
    "all-gather": size * share,
    "all-reduce": 2 * size * share,  # a sum of parts, then all of them gathered
    "reduce-scatter": size * (n - 1),
    "all-to-all": size * share,
    "ragged-all-to-all": size * share,
  }.get(kind, float(size))
  return Collective(kind, shapes, size, moved, axes, n)


def _scattered(one: Collective, kept: str) -> Collective:
  """Returns a sum as one of which a device keeps a part. kept: the part's type."""
  shapes = _shapes(_ARRAY.findall(kept))
  return dataclasses.replace(
    one, kind="reduce-scatter", shapes=shapes, size=_size(shapes), moved=one.moved / 2
  )


def _shapes(arrays: list[tuple[str, str]]) -> Shapes:
  return tuple((dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in arrays)


def _size(shapes: Shapes) -> int:
  return int(sum(_width(dtype) * math.prod(sizes) for dtype, sizes in shapes))


def _width(dtype: str) -> float:
  """Returns the bytes of a number."""
  if dtype in _BYTES:
    return _BYTES[dtype]
  return int(re.search(r"\d+", dtype)[0]) / 8  # s32, u8, s4, f8e4m3fn


def _group(line: str, devices: int) -> Sequence[int]:
  """Returns the first group of devices that exchange: XLA's groups are alike."""
  if pairs := re.search(r"source_target_pairs=\{\{([\d,]+)\}", line):
    # a ring or a shift: who takes part is told by those that differ
    every = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)[1]
    shifts = map(_numbers, re.findall(r"\{([\d,]+)\}", every))
    return max(shifts, key=lambda pair: pair[0] != pair[1], default=_numbers(pairs[1]))
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, source = _numbers(iota[1]), _numbers(iota[2])
    ids = np.arange(math.prod(source)).reshape(source)
    if iota[3]:
      ids = ids.transpose(_numbers(iota[3]))
    return ids.reshape(shape[0], -1)[0].tolist()
  if of_mesh := _OF_MESH.search(line):
    return _group_of_mesh(*of_mesh.groups())
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return _numbers(listed[1])
  return range(devices)


def _group_of_mesh(sizes: str, order: str | None, turned: str | None, axes: str) -> list[int]:
  """Returns the first group of a mesh that XLA made for itself, as it writes it:

  mesh['a'=2,'b'=8], device_ids=([4,4]T(1,0)) {'b':(2)4}    4 devices, every second one of axis b
  """
  named = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
  ids = np.arange(math.prod(named.values()))
  if order:
    ids = ids.reshape(_numbers(order))
    ids = ids.transpose(_numbers(turned)) if turned else ids
  shape, taken = [], []
  parts = {name: (before, size) for name, before, size in re.findall(_AXIS, axes)}
  for name, length in named.items():
    before, size = parts.get(name, ("", "1"))
    before, size = int(before or 1), int(size or length)
    shape += [before, size, length // (before * size)]
    taken += [0, slice(None) if name in parts else 0, 0]
  return ids.reshape(shape)[tuple(taken)].ravel().tolist()


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


def _over(group: Sequence[int], mesh: dict[str, int]) -> tuple[Sequence[int], tuple[str, ...]]:
  """Returns the group and the axes of the mesh along which its devices differ."""
  sizes = tuple(mesh.values()) or (1,)
  places = np.stack(np.unravel_index(list(group), sizes), axis=1)
  differ = (places != places[:1]).any(axis=0)
  return group, tuple(name for name, is_one in zip(mesh, differ, strict=False) if is_one)
