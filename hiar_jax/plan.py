"""Plans a run before its devices are there: memory, operations, traffic and compile time of its
programs, by the compilers of the devices that it is meant for:

    pip install 'hiar_jax[plan-tpu]'    # or [plan-gpu]; neither needs a chip or a driver
    python -m hiar_jax.plan --config=experiments/hiar_wan_1_3b.py --on=v5p:4x4x4
    python -m hiar_jax.plan --config=experiments/hiar_wan_1_3b.py --on=h200:8x8 --program=critic

Nothing is run and no weight is made. A program of full size takes one to fifteen minutes; what was
found is kept, so a plan can be made in several sittings, and a program that has not changed is not
compiled again.
"""

import pathlib
import sys

from absl import flags
import jax

from hiar_jax.config import command_line as configs
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning import compiled, programs, table, targets
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.compiled import Row
from hiar_jax.planning.programs import PROGRAMS, Entry
from hiar_jax.planning.targets import Target
from hiar_jax.streaming.abstract_tick import TICK
from hiar_jax.training.device_mesh import open_mesh
from hiar_jax.training.experiment import Experiment

ENTRIES: dict[str, Entry] = {**PROGRAMS, "tick": TICK}
CACHE = "~/.cache/hiar_jax/plans"


def main() -> None:
  """Prints a row for each program, as soon as it is there."""
  f = flags.FLAGS
  if f.config is None:
    raise UserError("--config is missing; give a config file, as --config=experiments/shapes.py")
  if f.on != targets.HERE:
    jax.config.update("jax_platforms", "cpu")
  e = build(Experiment, f.config)
  names = programs.chosen(e, f.program, ENTRIES)
  target = targets.parse(f.on)
  cache, rows = pathlib.Path(f.cache).expanduser(), []
  for name in names:
    row = find(e, name, target, cache, f.compile)
    if row is None:
      print(f"{name} on {f.on}: not compiled yet", file=sys.stderr, flush=True)
    else:
      rows.append(row)
      if not f.table:
        print(table.lines(row), flush=True)
  if f.table:
    print(table.markdown(rows))


def find(
  e: Experiment, name: str, target: Target, cache: pathlib.Path, compile: bool = True
) -> Row | None:
  """Returns the row of a program, as compiled.find."""
  entry = ENTRIES[name]
  devices = list(target.devices)
  mesh = open_mesh(e, devices, target.memory) if entry.trains else make_mesh(MeshConfig(), devices)
  run = AbstractRun(e, pathlib.Path(), mesh)
  return compiled.find(run, name, entry.make, target, cache, compile)


if __name__ == "__main__":
  configs.define_config(
    "config file, and its variant; --config.KEY=VALUE overrides a number", Experiment
  )
  flags.DEFINE_string("on", targets.HERE, "devices: here, v5p:4x4x4, h200:8x8 (hosts x GPUs)")
  flags.DEFINE_string("program", "", f"some of {', '.join(ENTRIES)}; empty: all that it has")
  flags.DEFINE_string("cache", CACHE, "folder of the rows that were made")
  flags.DEFINE_bool("table", False, "print one markdown table")
  flags.DEFINE_bool("compile", True, "make what is not kept; --nocompile lists what is there")
  configs.run_flags(main)
