"""Runs commands of hiar_jax in turn, each in a fork of this process, which has done slow imports.

    python -P forks.py < task.json    {"strict": true, "commands": [[name, module, [argument]]]}

Only packages of others are imported before the fork; hiar_jax itself is read by each command anew,
as by `python -m`. Leaves `commands/<name>.json` with the exit status and what was printed to
stdout, and `<name>.stderr` beside it. Prints the name of each command when it has ended, its
status, its seconds and those of CPU time. strict: the first command that fails is the last one.
The file stands alone: it runs with another tree's code.
"""

import importlib
import json
import os
import pathlib
import runpy
import sys
import time
import traceback

SLOW = (
  "jax",
  "jax.numpy",
  "flax",
  "optax",
  "orbax.checkpoint",
  "grain",
  "tensorflow_datasets",
  "ml_collections",
  "av",
  "PIL.Image",
  "tokenizers",
  "safetensors",
  "beartype",
  "jaxtyping",
  "matplotlib.pyplot",
)


def run(
  module: str, arguments: list[str], out: pathlib.Path, err: pathlib.Path
) -> tuple[int, float]:
  """(exit status, CPU seconds) of `python -m module arguments`, which prints into the files."""
  sys.stdout.flush()
  child = os.fork()
  if not child:
    _become(module, arguments, out, err)
  _, status, usage = os.wait4(child, 0)
  return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _become(module: str, arguments: list[str], out: pathlib.Path, err: pathlib.Path) -> None:
  """Turns the forked process into the command; does not return."""
  status = 1
  try:
    for descriptor, path in ((1, out), (2, err)):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [module, *arguments]
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    status = 0
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
  except BaseException:  # whatever it is, the process ends here, as an interpreter's would
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
  for name in SLOW:
    importlib.import_module(name)
  folder = pathlib.Path("commands")
  folder.mkdir(exist_ok=True)
  task = json.load(sys.stdin)
  for name, module, arguments in task["commands"]:
    start, out = time.monotonic(), folder / f"{name}.stdout"
    status, cpu = run(module, arguments, out, folder / f"{name}.stderr")
    record = {"status": status, "stdout": out.read_text().splitlines()}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2))
    out.unlink()
    print(name, status, f"{time.monotonic() - start:.1f}", f"{cpu:.1f}", flush=True)
    if status and task["strict"]:
      return


if __name__ == "__main__":
  main()
