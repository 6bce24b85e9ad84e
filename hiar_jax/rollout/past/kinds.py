"""The kinds of past, `history.past` of a config: what of earlier blocks is kept, and who sees it.

A new kind is a subclass of Ring and a line here. `visible` and `capacity` are its rule, `slots_of`
and `blocks_before` say where frames lie. Training asks `visible`, for static reads, and `packed`.
"""

from hiar_jax.errors import one_of
from hiar_jax.method import MethodConfig
from hiar_jax.rollout.past.packed import PackedRing
from hiar_jax.rollout.past.ring import Ring

PASTS: dict[str, type[Ring]] = {
  "ring": Ring,
  "packed": PackedRing,
}


def kind(method: MethodConfig) -> type[Ring]:
  """Returns the class of a method's past.

  Raises UserError for a name that is not in PASTS, and for a method that the past is not for.
  """
  one_of(PASTS, **{"history.past": method.past})
  PASTS[method.past].check(method)
  return PASTS[method.past]
