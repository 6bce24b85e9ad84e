"""jit for programs that run once or twice on a handful of numbers, where compiling is what takes
the time.
"""

import functools

import jax

# A quarter of the usual compile time; the numbers differ by rounding alone.
_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _known_options() -> tuple[tuple[str, object], ...]:
  """Those that this version of XLA still has: they come and go."""
  known = []
  for name, value in _OPTIONS.items():
    try:
      jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError as error:
      if "No such compile option" not in str(error):
        raise
      continue
    known.append((name, value))
  return tuple(known)


def quick_jit(function):
  return jax.jit(function, compiler_options=dict(_known_options()))
