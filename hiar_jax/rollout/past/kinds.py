"""The kinds of past, `history.past` of a config: what of earlier blocks is kept, and who sees it.

A new kind is a subclass of Ring and a line here. `visible` and `capacity` are its rule, `slots_of`
and `blocks_before` say where frames lie. Training asks `visible` alone, for static reads.
"""

from hiar_jax.errors import one_of
from hiar_jax.method import MethodConfig
from hiar_jax.rollout.past.ring import Ring

PASTS: dict[str, type[Ring]] = {
  "ring": Ring,
}


def kind(method: MethodConfig) -> type[Ring]:
  """Returns the class of a method's past. Raises UserError for a name that is not in PASTS."""
  one_of(PASTS, **{"history.past": method.past})
  return PASTS[method.past]
