"""Programs of a card's run: some are compiled side by side, then timed one after another.

Nothing is compiled while a program is timed: the compiler's trials would share the card, and a CUDA
graph that is being captured is lost when another thread loads a module (seen on an H200, jax
0.11.2: `cudaErrorStreamCaptureInvalidated`, for every program after it).
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import machine

TOGETHER = 8  # programs that are compiled side by side


@dataclasses.dataclass(frozen=True)
class Program:
  """function(shared(), *fill()), jitted; both are jitted too, and called when it is timed.

  shared: weights, kept while the programs that follow have the same function; without, no argument.
  donate: fill's first argument is donated, and the first result succeeds it (a training state).
  tflop: needed arithmetic. frames: of video that a run makes. check: result -> figures, by name.
  tune: whether the GPU's compiler tries its variants of matrix products; a reference needs none.
  """

  name: str
  function: Callable
  fill: Callable[[], tuple]
  shared: Callable[[], Any] | None = None
  tflop: float | None = None
  frames: int | None = None
  repeats: int = 3
  donate: bool = False
  check: Callable[[Any], dict[str, float]] | None = None
  tune: bool = True


def run(programs: list[Program], seconds: float) -> Iterator[tuple[str, dict]]:
  """Yields (name, figures or {"error": ...}) of each program, in order.

  Raises nothing for a program that fails: the others are wanted. Those that are not begun after
  nine tenths of `seconds` are not run.
  """
  start, kept = time.perf_counter(), (None, ())
  for first in range(0, len(programs), TOGETHER):
    batch = programs[first : first + TOGETHER]
    if time.perf_counter() - start > 0.9 * seconds:
      yield from ((program.name, {"error": "no time was left"}) for program in batch)
      continue
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
      compiled = [pool.submit(_compile, program) for program in batch]
    for program, future in zip(batch, compiled, strict=True):
      try:
        executable, compile_s = future.result()
        if kept[0] is not program.shared:
          kept = (None, ())  # the old weights go before the new ones come
          kept = (program.shared, _made(_arguments_of(program.shared)))
        yield program.name, {"compile_s": compile_s, **_timed(program, executable, kept[1])}
      except Exception as error:  # noqa: BLE001  # whatever it is, it is this program's result
        lines = str(error).strip().splitlines() or [""]
        yield program.name, {"error": f"{type(error).__name__}: {lines[0][:300]}"}


def _arguments_of(shared: Callable | None) -> Callable[[], tuple]:
  return (lambda: (shared(),)) if shared else tuple


def _made(fill: Callable[[], tuple]) -> tuple:
  return jax.block_until_ready(jax.jit(fill)())


def _compile(program: Program):
  """Returns (executable, seconds). Tracing is not counted: threads share the interpreter."""
  shared = jax.eval_shape(_arguments_of(program.shared))
  donated = (len(shared),) if program.donate else ()
  jitted = jax.jit(program.function, donate_argnums=donated)
  lowered = jitted.lower(*shared, *jax.eval_shape(program.fill))
  start = time.perf_counter()
  options = {} if program.tune else {"xla_gpu_autotune_level": 0}
  executable = lowered.compile(compiler_options=options)
  return executable, round(time.perf_counter() - start, 2)


def _timed(program: Program, executable, shared: tuple) -> dict:
  memory = executable.memory_analysis()
  arguments, times = _made(program.fill), []
  for _ in range(1 + program.repeats):
    start = time.perf_counter()
    result = jax.block_until_ready(executable(*shared, *arguments))
    times.append(time.perf_counter() - start)
    if program.donate:
      arguments = (result[0], *arguments[1:])
  seconds = statistics.median(times[1:])
  found = {
    "run_s": seconds,
    "runs_s": [round(t, 6) for t in times],
    "temp_bytes": memory and memory.temp_size_in_bytes,
    "argument_bytes": memory and memory.argument_size_in_bytes,
    "peak_bytes": machine.peak_bytes(),
  }
  if program.tflop:
    found |= {"tflop": program.tflop, "tflop_per_s": program.tflop / seconds}
  if program.frames:
    found["frames_per_s"] = program.frames / seconds
  if program.check:
    found |= program.check(result)
  return found


def normal(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
  """Returns standard normal numbers; never zeros, on which a card may be faster."""
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
