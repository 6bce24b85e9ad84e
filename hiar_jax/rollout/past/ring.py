"""The KV cache: what earlier frames show to later ones, as an explicit pytree.

Slots hold frames. The first `sink` slots belong to the first frames for ever; the others are a ring
that the rest pass through, so a
cache never grows and never moves: a block is written over the oldest frames. `position` says which
frame a slot holds, -1 for none, and masks are computed from it (visibility.past_mask), so the order
of the slots does not matter. Positions are absolute frame indices (exact at any length, see
models.rope).
"""

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.models.dit import KV, DiTConfig
from hiar_jax.types import Positions


@flax.struct.dataclass
class Cache:
  """kv: each [num_layers b slots t a d]; position: [slots] int32."""

  kv: KV
  position: jax.Array

  @property
  def slots(self) -> int:
    return self.position.shape[0]


def empty(
  config: DiTConfig, method: Method, *, batch: int, frames: int, height: int, width: int
) -> Cache:
  """A cache for videos of up to `frames` latent frames of height x width; with a window its size
  does not depend on `frames`.
  """
  slots = method.cache_frames(frames)
  shape = (
    config.num_layers,
    batch,
    slots,
    config.tokens(height, width),
    config.num_heads,
    config.head_dim,
  )
  zeros = jnp.zeros(shape, config.dtype)
  return Cache(KV(zeros, zeros), jnp.full(slots, -1, jnp.int32))


def slots_of(positions: Positions, slots: int, sink: int) -> jax.Array:
  """The slot of each frame of a block; `slots` (out of range) for frames that the ring is too small
  to keep.
  """
  ring = slots - sink
  in_ring = sink + (positions - sink) % max(ring, 1)
  kept = positions > positions[-1] - ring
  return jnp.where(positions < min(sink, slots), positions, jnp.where(kept, in_ring, slots))


def write(cache: Cache, kv: KV, positions: Positions, method: Method) -> Cache:
  """Puts a block's K/V into its slots."""
  if not cache.slots:
    return cache
  slots = slots_of(positions, cache.slots, method.sink)
  put = lambda old, new: old.at[:, :, slots].set(
    new.astype(old.dtype), mode="drop", unique_indices=True
  )
  return Cache(
    jax.tree.map(put, cache.kv, kv), cache.position.at[slots].set(positions, mode="drop")
  )
