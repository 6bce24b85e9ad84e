"""What queries see of the keys: a few runs of both, known while a program is traced.

Frames of a group see the same, so a whole forward is a handful of views, and a view needs no mask:
its keys are slices. Which of them are there may be known only when the program runs (the slots of a
ring); that is a row of bools over them. Runs count cells: frames, or tokens where there are no
frames (packed history).

    block-causal, 2 blocks of 2 frames       queries 0-1 see keys 0-1, queries 2-3 see keys 0-3
    a block after a ring of 6 slots          queries 0-1 see keys 0-7, row: [slots ... | True True]
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool
import numpy as np

from hiar_jax.types import Array

Run = tuple[int, int]  # first and end


@flax.struct.dataclass
class View:
  """A run of queries and the runs of keys that all of them see, in ascending order.

  row: of the keys of these runs, those that are there; None = all. Queries for which none is there
  see them all: what they see is of no account, and has to be finite.
  """

  queries: Run = flax.struct.field(pytree_node=False)
  keys: tuple[Run, ...] = flax.struct.field(pytree_node=False)
  row: Bool[Array, "n"] | None = None

  def of(self, x: jax.Array) -> jax.Array:
    """Returns the cells of x [b m ...] that are seen: [b n ...]."""
    parts = [x[:, first:end] for first, end in self.keys]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

  @property
  def seen(self) -> int:
    """The number of keys in the runs."""
    return sum(end - first for first, end in self.keys)


Views = tuple[View, ...]


def view(queries: Run, sources: Sequence[Any]) -> View:
  """Returns what queries see. sources: Bool[n] for consecutive keys, numpy's where known while the
  program is traced. Raises ValueError where nothing can be seen.
  """
  # what may be seen: of a source that is traced, all
  mask = np.concatenate(
    [s if isinstance(s, np.ndarray) else np.ones(len(s), bool) for s in sources]
  )
  if not mask.any():
    raise ValueError(f"queries {queries} see no keys")
  edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
  keys = tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
  if all(isinstance(s, np.ndarray) for s in sources):
    return View(queries, keys)
  row = jnp.concatenate([s[s] if isinstance(s, np.ndarray) else s for s in sources])
  if not any(isinstance(s, np.ndarray) and s.any() for s in sources):
    row = row | ~row.any()
  return View(queries, keys, row)


def simplified(views: Views, keys: int) -> Views:
  """Returns the views with neighbours of the same static keys joined; () where all see all."""
  joined: list[View] = []
  for v in views:
    last = joined[-1] if joined else None
    if last and last.row is None and v.row is None and last.keys == v.keys:
      joined[-1] = View((last.queries[0], v.queries[1]), v.keys)
    else:
      joined.append(v)
  whole = len(joined) == 1 and joined[0].row is None and joined[0].keys == ((0, keys),)
  return () if whole else tuple(joined)


def dense_mask(views: Views, keys: int):
  """Returns the views as one mask [queries, keys], numpy's where they are static; None where all
  see all. For small sizes.
  """
  if not views:
    return None
  rows = []
  for v in views:
    row, parts, cell = v.row, [], 0
    taken = 0
    for first, end in v.keys:
      parts.append(np.zeros(first - cell, bool))
      n, cell = end - first, end
      parts.append(np.ones(n, bool) if row is None else row[taken : taken + n])
      taken += n
    parts.append(np.zeros(keys - cell, bool))
    module = np if row is None else jnp
    seen = module.concatenate(parts)
    rows.append(module.broadcast_to(seen[None], (v.queries[1] - v.queries[0], keys)))
  static = all(isinstance(row, np.ndarray) for row in rows)
  return (np if static else jnp).concatenate(rows)
