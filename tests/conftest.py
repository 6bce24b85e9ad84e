"""Every test sees eight virtual CPU devices and strict array shapes."""

import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import threading

# before jax is imported, here and in the processes that tests start
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Compiling takes most of the time here, and what is compiled runs once or twice on a handful of
# numbers; processes that tests start compile alike, so that whatever is compared bit for bit has
# the same options on both sides.
OPTIONS = [
  "--xla_cpu_opt_preset=FAST_COMPILE",
  "--xla_backend_optimization_level=0",
  "--xla_cpu_parallel_codegen_split_count=1",
]
# Later ones end the process at the name of an option that they don't know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  OPTIONS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *OPTIONS])
# Commands would start their process once more to get huge pages, after all imports.
os.environ.setdefault("GLIBC_TUNABLES", "")
# Then tracing is next: no line numbers in programs, and fewer walks over all objects to collect.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
gc.set_threshold(50_000, 20, 20)

# Programs are compiled once for the processes that tests start: a smoke run is four times as fast
# the second time. The first process makes the folder, the others inherit it.
PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="hiar_jax_programs_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from absl import flags
import jax
from jax._src.interpreters import mlir
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Here alone: a worker meets hardly a program twice, and what it wrote took a twentieth of all time.
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_rank_promotion", "raise")


def reused(make, times: int = 10):
  """Returns a function that makes an object anew at every tenth call of a thread."""
  local = threading.local()

  def get():
    made, count = getattr(local, "made", (None, times))
    if count == times:
      made, count = make(), 0
    local.made = made, count + 1
    return made

  return get


# Later versions do so themselves: to make a context for each program took a tenth of all time.
if not hasattr(mlir, "_thread_local_context"):
  mlir.make_ir_context = reused(mlir.make_ir_context)

# Worker processes of grain read absl flags, which only `app.run` parses.
flags.FLAGS.mark_as_parsed()


# The files that take minutes, longest first: started last, one of them would keep a single worker
# busy after the others have finished (xdist itself starts those with the most tests first).
LONGEST = (
  "tests/test_train.py",
  "tests/training/test_steps.py",
  "tests/test_generate_wan.py",
  "tests/benchmarks/test_programs.py",
  "tests/test_old_runs.py",
  "tests/test_train_wan.py",
)


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):
    config.option.loadscopereorder = False


def pytest_collection_finish():
  gc.freeze()  # what was imported stays: no collection needs to walk it


def pytest_unconfigure():
  if PROGRAMS is not None:
    shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_collection_modifyitems(items):
  """Starts the longest files first. Live comparisons need the extra [parity]; where it is not
  installed they are skipped, and the summary says so.
  """
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
  missing = [
    name
    for name in ("torch", "transformers", "diffusers")
    if importlib.util.find_spec(name) is None
  ]
  skip = pytest.mark.skip(reason=f"the extra [parity] is not installed ({', '.join(missing)})")
  for item in items if missing else ():
    if item.get_closest_marker("parity"):
      item.add_marker(skip)
