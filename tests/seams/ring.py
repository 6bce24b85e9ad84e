"""The past as a ring of slots, one latent frame each: what blocks see of earlier forwards.

The first `sink` slots keep the first frames; in the others a new block overwrites the oldest.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.types import Block, LatentShape, Positions
from tests.seams.frames import KV, Frames, Network, Read
from tests.seams.method import Method


@flax.struct.dataclass
class Ring:
  """kv: of all slots; positions: [slots] int32, -1 where empty; latents [b slots h w c], what the
  K/V were computed from, kept where they may have to be computed again (recache), else None.
  """

  kv: Any
  positions: jax.Array
  latents: jax.Array | None
  method: Method = flax.struct.field(pytree_node=False)

  @classmethod
  def empty(
    cls, network: Network, method: Method, shape: LatentShape, batch: int, latents: bool = False
  ) -> "Ring":
    """Returns an empty past for videos of shape.frames latent frames."""
    slots = method.past_frames(shape.frames)
    kv = network.empty_kv(slots, batch, shape.height, shape.width)
    kept = jnp.zeros((batch, *shape.block(slots))) if latents else None
    return cls(kv, jnp.full(slots, -1, jnp.int32), kept, method)

  @property
  def slots(self) -> int:
    return self.positions.shape[0]

  def read(self, groups: tuple[Frames, ...]) -> tuple[tuple[Frames, ...], tuple[KV, ...]]:
    """Returns the groups with what they read of the past, and the past that Network.apply takes."""
    if not self.slots:
      return groups, ()
    method, sink = self.method, self.method.sink
    rows = [method.visible(g.positions[-1], self.positions) for g in groups]
    if not method.moves_sink:
      reads = [(Read(past=0, seen=row),) for row in rows]
      return _with_reads(groups, reads), (self.kv,)
    # The sink is at a distance of its own from each group, so there is a copy for each:
    # [ring | sink moved for group 0 | sink moved for group 1 ...]
    first = self.kv.frames(0, sink)
    ends = [g.positions[-1] + 1 for g in groups]
    moved = [first.moved(jnp.maximum(end - method.window, 0)) for end in ends]
    reads = [
      (Read(past=0, seen=row[sink:]), Read(past=1 + i, seen=row[:sink]))
      for i, row in enumerate(rows)
    ]
    return _with_reads(groups, reads), (self.kv.frames(sink, self.slots), *moved)

  def write(self, kv: KV, latents: Block, positions: Positions, keep=True) -> "Ring":
    """Writes a block's K/V, and latents where they are kept; keep: bool, or one a frame."""
    if not self.slots:
      return self
    slots = jnp.where(keep, self.slots_of(positions), self.slots)
    return self.replace(
      kv=self.kv.put(slots, kv),
      positions=self.positions.at[slots].set(positions, mode="drop"),
      latents=None if self.latents is None else self.latents.at[:, slots].set(latents, mode="drop"),
    )

  def slots_of(self, positions: Positions) -> jax.Array:
    """Returns the slot of each frame of a block; out of range for those that do not fit."""
    sink, ring = self.method.sink, self.slots - self.method.sink
    in_ring = sink + (positions - sink) % max(ring, 1)
    kept = positions > positions[-1] - ring
    return jnp.where(
      positions < min(sink, self.slots), positions, jnp.where(kept, in_ring, self.slots)
    )

  def blocks_before(self, n) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks that slots may hold before block n is due, oldest first, and which are
    meant: the sink's, and the last before n (one more than fits: the ring may begin inside one).
    """
    k = self.method.block
    head, tail = -(-min(self.method.sink, self.slots) // k), -(-self.slots // k) + 1
    order = jnp.concatenate([jnp.arange(head), n - tail + jnp.arange(tail)])
    return order, (jnp.arange(head + tail) < head) | (order >= head)

  def kept_latents(self, positions: Positions) -> tuple[Block, jax.Array]:
    """Returns the latents at a block's positions, and which of its frames are there: Bool[k]."""
    slots = jnp.minimum(self.slots_of(positions), self.slots - 1)
    return self.latents[:, slots], self.positions[slots] == positions

  def emptied(self) -> "Ring":
    """Returns the ring without K/V, its latents kept: what a recache starts from."""
    kv = jax.tree.map(jnp.zeros_like, self.kv)
    return self.replace(kv=kv, positions=jnp.full_like(self.positions, -1))


def _with_reads(groups, reads) -> tuple[Frames, ...]:
  # the past stands before other groups, in reads as in the keys
  return tuple(g.replace(reads=(*r, *g.reads)) for g, r in zip(groups, reads, strict=True))
