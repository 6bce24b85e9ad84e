"""Reads broken things, one after another, in a process that may die of one.

It gets a line of JSON, [kind, seed, number], and answers with one: {outcome, seconds, mib, what}.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import io
import json
import pathlib
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np

from benchmarks.fuzz.mutations import Dice
from hiar_jax.errors import LONGEST, UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """make: writes what is right into a folder, once. broken: copies it, broken, to another folder,
  and returns what its reader takes. read: of that.
  """

  make: Callable[[pathlib.Path], None]
  broken: Callable[[pathlib.Path, pathlib.Path, Dice], object]
  read: Callable[[object], None]


def read_case(kind: Kind, right: pathlib.Path, dice: Dice) -> dict:
  """Reads one broken thing. outcome: `read`, `refused`, or `fault` with its traceback in `what`."""
  place = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_"))
  start, what = time.monotonic(), ""
  try:
    given = kind.broken(right, place, dice)
    said = io.StringIO()  # stdout is for the answers
    with contextlib.ExitStack() as stack:
      stack.enter_context(contextlib.redirect_stderr(said))
      stack.enter_context(contextlib.redirect_stdout(said))
      stack.enter_context(warnings.catch_warnings())
      warnings.simplefilter("ignore")
      kind.read(given)
    outcome = "read"
  except UserError as error:
    outcome, what = "refused", str(error)
    if not what.strip() or len(what) > LONGEST + 100:
      outcome = "fault"
  except BaseException:
    outcome, what = "fault", traceback.format_exc()
  finally:
    shutil.rmtree(place, ignore_errors=True)
  return {"outcome": outcome, "seconds": time.monotonic() - start, "mib": _peak(), "what": what}


def _peak() -> float:
  """Returns the MiB of the largest resident set so far."""
  status = pathlib.Path("/proc/self/status")
  for line in status.read_text().splitlines() if status.exists() else ():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) / 1024
  # on Linux at least that of the process that started this one
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
    2**20 if sys.platform == "darwin" else 1024
  )


def serve(kinds: Mapping[str, Kind]) -> None:
  """Answers on stdout what stdin asks for."""
  rights: dict[str, pathlib.Path] = {}
  with tempfile.TemporaryDirectory(prefix="fuzz_right_") as folder:
    for line in sys.stdin:
      name, seed, number = json.loads(line)
      if name not in rights:
        rights[name] = pathlib.Path(folder) / name
        rights[name].mkdir()
        kinds[name].make(rights[name])
      dice = np.random.default_rng([seed, sorted(kinds).index(name), number])
      print(json.dumps(read_case(kinds[name], rights[name], dice)), flush=True)
