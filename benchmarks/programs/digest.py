"""What a lowered program says, in two digests: its operations, and how they feed each other.

Neither sees source locations, names of functions, donated buffers or shardings.

    operations   The multiset of operations with their types and attributes. A function is counted
                 at each of its calls, so what JAX outlines, shares or names otherwise is no
                 difference.
    dataflow     The graph that leads to the results: each value is a hash of its operation and of
                 the values that it is made from. What is computed twice, or read by no result, is
                 no difference; operands that change places are one.

Arguments and results of one type are told apart by their order among those of that type, and so are
values of one type that a loop carries from the same start. Any other order is no difference.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib

import jax

LONG = 1_000  # characters of an attribute (a table of numbers) above which its hash stands for it
RETURNS = ("func.return", "stablehlo.return")
LOOP, BRANCHES = "stablehlo.while", ("stablehlo.case", "stablehlo.if")
SAME = "sdy.sharding_constraint"  # its result is its operand
COMMUTATIVE = {
  f"stablehlo.{name}" for name in ("add", "multiply", "maximum", "minimum", "and", "or", "xor")
}


@dataclasses.dataclass(frozen=True)
class Digest:
  """See the module's docstring. counts: of each operation, written as one line."""

  operations: str
  dataflow: str
  counts: Mapping[str, int]

  @property
  def size(self) -> int:
    """Operations."""
    return sum(self.counts.values())


def of_lines(lines: Iterable[str]) -> str:
  """Of lines of text, in their order."""
  return _hash(*lines)


def of_lowered(lowered: jax.stages.Lowered) -> Digest:
  """Of what jax.jit(f).lower(...) returns; nothing is compiled."""
  return of_module(lowered.compiler_ir("stablehlo"))


def of_module(module) -> Digest:
  """Of MLIR's module, whose one public function is the program."""
  functions, public = {}, ""
  for op in module.body.operations:
    if op.operation.name == "func.func":
      name = op.attributes["sym_name"].value
      functions[name] = _parse(op.regions[0].blocks[0], {}, {})
      if op.attributes["sym_visibility"].value == "public":
        public = name
  walk, main = _Walk(functions), functions[public]
  arguments = [_hash("argument", place) for place in _numbered(main.types)]
  results = walk.block(main, arguments, {}, "")
  places = _numbered([main.type_of[value] for value in main.returned])
  made = sorted(f"{place} {result}" for place, result in zip(places, results, strict=True))
  lines = sorted(f"{count} x {line}" for line, count in walk.counts.items())
  return Digest(_hash(*lines), _hash(*made), walk.counts)


# --------------------------------------------------------------------------- a module as plain data


@dataclasses.dataclass(frozen=True, slots=True)
class _Operation:
  """line: all that it says but its operands. Values are numbered within a function."""

  name: str
  line: str
  operands: tuple[int, ...]
  results: tuple[int, ...]
  blocks: tuple["_Block", ...]
  callee: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Block:
  """types: of the arguments; type_of: of every value of the function."""

  arguments: tuple[int, ...]
  types: tuple[str, ...]
  operations: tuple[_Operation, ...]
  returned: tuple[int, ...]
  type_of: Mapping[int, str]


def _parse(block, numbers: dict, type_of: dict[int, str]) -> _Block:
  """MLIR's block. numbers, type_of: of the function's values so far; the block's are added."""

  def number(value) -> int:
    numbers[value] = found = len(numbers)
    type_of[found] = str(value.type)
    return found

  def joined(values: tuple[int, ...]) -> str:
    return ", ".join(type_of[value] for value in values)

  arguments = tuple(number(value) for value in block.arguments)
  operations, returned = [], ()
  for op in block.operations:
    op = op.operation
    operands = tuple(numbers[value] for value in op.operands)
    if op.name in RETURNS:
      returned = operands
      continue
    blocks = tuple(
      _parse(region.blocks[0], numbers, type_of) for region in op.regions if len(region.blocks)
    )
    results = tuple(number(value) for value in op.results)
    line = f"{op.name} {_attributes(op)}: ({joined(operands)}) -> ({joined(results)})"
    callee = op.attributes["callee"].value if op.name == "func.call" else ""
    operations.append(_Operation(op.name, line, operands, results, blocks, callee))
  types = tuple(type_of[value] for value in arguments)
  return _Block(arguments, types, tuple(operations), returned, type_of)


def _attributes(op) -> str:
  """Those that change a number."""
  said = []
  for name in sorted(op.attributes):
    if "sharding" not in name and name not in ("channel_handle", "mhlo.frontend_attributes"):
      text = str(op.attributes[name])
      said.append(f"{name} = {text if len(text) <= LONG else f'{text[:20]}... {_hash(text)}'}, ")
  return "".join(said)


# -------------------------------------------------------------------------------- a walk through it


class _Walk:
  """Counts the operations that it meets, and computes the hash of every value."""

  def __init__(self, functions: Mapping[str, _Block]):
    self.functions = functions
    self.counts: Counter[str] = Counter()

  def block(
    self, block: _Block, arguments: Sequence[str], around: Mapping[int, str], path: str
  ) -> list[str]:
    """Hashes of what it returns. around: of the values outside; path: the loops that it is in."""
    values = {**around, **dict(zip(block.arguments, arguments, strict=True))}
    for op in block.operations:
      values.update(zip(op.results, self.operation(op, values, path), strict=True))
    return [values[value] for value in block.returned]

  def operation(self, op: _Operation, values: Mapping[int, str], path: str) -> list[str]:
    """Hashes of its results."""
    operands = [values[value] for value in op.operands]
    if op.callee:
      return self.block(self.functions[op.callee], operands, {}, path)
    if op.name == SAME:
      return operands
    if op.name == LOOP:
      self.counts[path + op.line] += 1
      return self.loop(op, operands, values, path)
    if op.name in BRANCHES:
      self.counts[path + op.line] += 1
      sides = [self.block(side, [], values, f"{path}branch: ") for side in op.blocks]
      return [_hash(op.name, *operands, *chosen) for chosen in zip(*sides, strict=True)]
    line = f"{op.line} of {self.inner(op, values)}" if op.blocks else op.line
    self.counts[path + line] += 1
    whole = _hash(line, *(sorted(operands) if op.name in COMMUTATIVE else operands))
    return [_hash(whole, str(i)) for i in range(len(op.results))]

  def loop(
    self, op: _Operation, operands: list[str], values: Mapping[int, str], path: str
  ) -> list[str]:
    condition, body = op.blocks
    starts = [f"{kind} {start}" for kind, start in zip(body.types, operands, strict=True)]
    carried = [_hash("carried", place) for place in _numbered(starts)]
    goes_on = self.block(condition, carried, values, f"{path}condition: ")
    after = self.block(body, carried, values, f"{path}loop: ")
    turns = [_hash(*turn) for turn in zip(carried, after, strict=True)]
    whole = _hash(op.name, *goes_on, *sorted(turns))
    return [_hash(whole, turn) for turn in turns]

  def inner(self, op: _Operation, values: Mapping[int, str]) -> str:
    """The function of a reduction, a scatter or a sort, in a few words."""
    apart, returned = _Walk(self.functions), []
    for block in op.blocks:
      arguments = [f"argument {i}" for i in range(len(block.arguments))]
      returned += apart.block(block, arguments, values, "")
    names = sorted(line.split(" ", 1)[0] for line in apart.counts)
    return f"{' '.join(names)} {_hash(*returned)[:8]}"


def _numbered(kinds: Sequence[str]) -> list[str]:
  """Each with its number among those that are alike."""
  seen: Counter[str] = Counter()
  places = []
  for kind in kinds:
    places.append(f"{kind} {seen[kind]}")
    seen[kind] += 1
  return places


def _hash(*parts: str) -> str:
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
