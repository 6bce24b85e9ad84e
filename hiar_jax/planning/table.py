"""Rows of a plan as text: some lines each, or a markdown table."""

from hiar_jax.peak_memory import size
from hiar_jax.planning.chips import GIB
from hiar_jax.planning.compiled import Row

COLUMNS = (
  "program",
  "on",
  "mesh",
  "arguments GiB",
  "temporaries GiB",
  "left GiB",
  "fits",
  "TFLOP a clip",
  "GB moved",
  "roofline s",
  "compile s",
)


def lines(row: Row) -> str:
  """Returns a row as some lines of text; sizes are those of one device."""
  in_all = f", {row['flops'] / 1e15:,.5g} P in all" * (row["clips"] > 1)
  mesh = f" ({_mesh(row)})" * (row["devices"] > 1)
  found = [
    f"{row['program']} on {row['on']}: {_many(row['devices'], 'device')}{mesh}, "
    f"{_many(row['clips'], 'clip')}",
    *_memory(row),
    f"FLOPs: {row['flops'] / row['clips'] / 1e12:,.5g} T a clip{in_all}",
    *_moved(row),
  ]
  if row.get("kernels"):
    found.append("kernels: " + ", ".join(f"{n} {name}" for name, n in row["kernels"].items()))
  if row["seconds"]:
    times = ", ".join(f"{seconds:,.3g} s {what}" for what, seconds in row["seconds"].items())
    found.append(f"roofline: {times}")
  found.append(f"lowered in {row['lower_s']} s, compiled in {row['compile_s']} s")
  return "\n  ".join(found)


def _many(count: int, what: str) -> str:
  return f"{count} {what}{'s' * (count != 1)}"


def _mesh(row: Row) -> str:
  return " x ".join(f"{axis} {count}" for axis, count in row["mesh"].items() if count > 1)


def _memory(row: Row) -> list[str]:
  parts = ", ".join(f"{name} {size(held)}" for name, held in row["parts"].items() if held)
  if "refused" in row:
    return [f"memory: does not fit; given {parts}; the compiler says: {row['refused']}"]
  line = (
    f"memory: {size(row['arguments'])} arguments ({parts}), {size(row['temporaries'])} "
    f"temporaries, {size(row['outputs'])} results"
  )
  if (left := row.get("left")) is not None:
    line += f"; of {size(row['memory'])} {size(abs(left))} are {'left' if left >= 0 else 'lacking'}"
    line += ": fits" if row["fits"] else ": does not fit with a tenth to spare"
  return [line]


def _moved(row: Row) -> list[str]:
  found = [
    f"moved: {one['moved'] / 1e9:,.3g} GB by {one['calls']:,.0f} {one['kind']} among "
    f"{one['group']} over {one['axes']}"
    for one in row.get("collectives", ())
  ]
  if largest := row.get("largest"):
    result = f"{largest['kind']} {largest['result']}, {size(largest['bytes'])}"
    found.append(f"largest result: {result}")
  return found + [f"over all examples of the batch: {x}" for x in row.get("over_the_batch", ())]


def markdown(rows: list[Row]) -> str:
  """Returns a table of rows; memory of one device."""
  cells = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cells(row: Row) -> tuple[str, ...]:
  def gib(name: str) -> str:
    return f"{row[name] / GIB:.1f}" if row.get(name) is not None else "-"

  moved = sum(one["moved"] for one in row.get("collectives", ())) / 1e9
  return (
    row["program"],
    row["on"],
    _mesh(row) or "-",
    gib("arguments"),
    gib("temporaries"),
    gib("left"),
    {True: "yes", False: "no", None: "-"}[row.get("fits")],
    f"{row['flops'] / row['clips'] / 1e12:,.0f}",
    f"{moved:,.1f}" if "collectives" in row else "-",
    " + ".join(f"{seconds:.3g}" for seconds in row["seconds"].values()) or "-",
    f"{row['compile_s']:,.0f}",
  )
