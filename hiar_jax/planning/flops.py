"""Operations of a traced program, loops multiplied out.

A compiler's own count takes a loop's body once and does not see into kernels. Here a jaxpr is
walked, the one that is differentiated and freed of what no result needs: matrix products alone, two
operations a multiply-add, as in the papers. A loop whose length is drawn when the program runs (the
exit level of a rollout) counts its mean number of turns.
"""

from collections.abc import Callable
import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable, *arguments, turns: float = 1.0) -> float:
  """Returns the operations of function(*arguments), arrays or shapes.

  turns: of loops whose length is not known while the program is traced.
  """
  closed = jax.make_jaxpr(function)(*arguments)
  used = [True] * len(closed.jaxpr.outvars)
  live, _ = partial_eval.dce_jaxpr(closed.jaxpr, used)
  return _of_jaxpr(live, turns)


def _of_jaxpr(jaxpr: core.Jaxpr, turns: float) -> float:
  return sum(_of_equation(equation, turns) for equation in jaxpr.eqns)


def _of_equation(equation, turns: float) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
  if name == "conv_general_dilated":
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(out) * math.prod(kernel) / kernel[features]
  if name == "scan":
    return params["length"] * _of_jaxpr(params["jaxpr"].jaxpr, turns)
  if name == "while":
    return turns * _of_jaxpr(params["body_jaxpr"].jaxpr, turns)
  if name == "cond":
    return max(_of_jaxpr(branch.jaxpr, turns) for branch in params["branches"])
  if "pallas" in name or "cudnn" in name:
    raise ValueError(f"{name}: a kernel cannot be counted; count the blockwise form")
  return sum(_of_jaxpr(inner, turns) for inner in _inner(params))


def _inner(params: dict) -> list[core.Jaxpr]:
  """Returns the jaxprs of a call (jit, remat, a custom gradient's own program)."""
  found = []
  for name, value in params.items():
    if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
      continue
    inner = getattr(value, "jaxpr", value)
    if isinstance(inner, core.Jaxpr):
      found.append(inner)
  return found
