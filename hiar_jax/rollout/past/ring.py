"""The KV cache as an explicit pytree: a ring of slots, one latent frame each.

The first `sink` slots keep the first frames of the video; the others are a ring in which a new
block overwrites the oldest frames, so a cache neither grows nor moves. `position` is the frame that
each slot holds, -1 for none. Masks are computed from it (visibility.past_mask), so the order of the
slots does not matter to attention. Positions are absolute frame indices, exact at any length (see
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
  """kv: each [num_layers b slots t a d]; position: [slots] int32, -1 where a slot is empty."""

  kv: KV
  position: jax.Array

  @property
  def slots(self) -> int:
    return self.position.shape[0]


def empty(
  config: DiTConfig, method: Method, *, batch: int, frames: int, height: int, width: int
) -> Cache:
  """Returns an empty cache for videos of up to `frames` latent frames of height x width.

  With a window its size does not depend on `frames`.
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
  """Returns the slot of each frame of a block, for a cache of `slots` with a sink of `sink` frames.

  `slots`, which is out of range, for frames that the ring is too small to keep.
  """
  ring = slots - sink
  # max(): a cache that holds the sink alone has no ring, and its modulus would be 0
  in_ring = sink + (positions - sink) % max(ring, 1)
  # of a block longer than the ring only the last frames stay, or two would share a slot
  kept = positions > positions[-1] - ring
  return jnp.where(positions < min(sink, slots), positions, jnp.where(kept, in_ring, slots))


def write(cache: Cache, kv: KV, positions: Positions, method: Method) -> Cache:
  """Writes a block's K/V [num_layers b k t a d] into its slots, in the cache's dtype."""
  if not cache.slots:
    return cache
  slots = slots_of(positions, cache.slots, method.sink)

  # mode="drop": the out-of-range slots of frames that are not kept
  def put(old, new):
    return old.at[:, :, slots].set(new.astype(old.dtype), mode="drop", unique_indices=True)

  return Cache(
    jax.tree.map(put, cache.kv, kv), cache.position.at[slots].set(positions, mode="drop")
  )
