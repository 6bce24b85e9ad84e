"""The past as a ring: K/V in slots of one latent frame each.

The first `sink` slots keep the first frames of the video; in the others a new block overwrites the
oldest frames, so the past neither grows nor moves. `positions` is the frame that each slot holds,
-1 for none; what a block sees follows from it, so the order of the slots does not matter to
attention. Positions are absolute frame indices, exact at any length (models.rope). `method` sets
the rules.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.method import Method, MethodConfig
from hiar_jax.models.frames import KV, Frames, Network, Read
from hiar_jax.rollout.past.visibility import visible
from hiar_jax.types import Block, LatentShape, Positions, Video


@flax.struct.dataclass
class Ring:
  """kv: the network's K/V of all slots. positions: [slots] int32. latents: [b slots h w c], those
  that the K/V were computed from, where they may have to be computed again (recache); else None.
  """

  kv: Any
  positions: jax.Array
  latents: jax.Array | None
  method: Method = flax.struct.field(pytree_node=False)

  # the rule: which frames a block sees, and how many are kept of a video
  visible = staticmethod(visible)
  capacity = staticmethod(MethodConfig.past_frames)

  @staticmethod
  def check(method: MethodConfig) -> None:
    """Raises UserError for a method that this kind of past is not for."""
    if method.packing:
      raise UserError(
        f"history.packing = {method.packing!r} is for history.past = 'packed', not {method.past!r}"
      )

  @staticmethod
  def pools(method: MethodConfig) -> tuple[int, ...]:
    """Returns the kernels of packed frames that the network needs projections for."""
    del method
    return ()

  @classmethod
  def empty(
    cls, network: Network, method: Method, shape: LatentShape, batch: int, latents: bool = False
  ) -> "Ring":
    """Returns a past that holds nothing yet, for videos of shape.frames latent frames.

    With a window its size does not depend on their number. latents: keep the latents too.
    """
    slots = cls.capacity(method, shape.frames)
    kept = jnp.zeros((batch, *shape.block(slots))) if latents else None
    kv = network.empty_kv(slots, batch, shape.height, shape.width)
    return cls(kv, jnp.full(slots, -1, jnp.int32), kept, method)

  @property
  def slots(self) -> int:
    return self.positions.shape[0]

  def read(self, groups: tuple[Frames, ...]) -> tuple[tuple[Frames, ...], tuple[KV, ...]]:
    """Returns the groups with what they read of the ring, and the past that Network.apply takes.

    A relative sink is at another distance from each group, so each reads a copy of its own:
    [ring | sink moved for the first group | sink moved for the second ...].
    """
    method, sink = self.method, self.method.sink
    rows = [self.visible(method, g.positions[-1], self.positions) for g in groups]
    if not method.moves_sink or not self.slots:
      reads = [(Read(past=0, seen=row),) for row in rows]
      past = (self.kv,)
    else:
      reads = [
        (Read(past=0, seen=row[sink:]), Read(past=1 + i, seen=row[:sink]))
        for i, row in enumerate(rows)
      ]
      still = self.kv.take(0, sink)
      # 0 until the window begins to roll
      distances = [jnp.maximum(g.positions[-1] + 1 - method.window, 0) for g in groups]
      past = (self.kv.take(sink, self.slots), *(still.moved(d) for d in distances))
    # the past's K/V stand before those of other groups
    groups = tuple(g.replace(reads=(*r, *g.reads)) for g, r in zip(groups, reads, strict=True))
    return groups, past

  @staticmethod
  def packed(method: MethodConfig, n: int, latents: Video, sigma) -> tuple[Frames, ...]:
    """Returns the packed history of block n of a whole clip (Frames.packed): here, none.

    latents: what the clip's frames show as context, from its first on; sigma: as Frames.
    """
    del method, n, latents, sigma
    return ()

  def write(self, kv: KV, context: Frames, keep=True) -> "Ring":
    """Writes the K/V of a block's context, and its latents where they are kept.

    keep: a bool, or one per frame.
    """
    if not self.slots:
      return self
    # under vmap a branch would run in any case: what is not kept goes out of range
    slots = jnp.where(keep, self.slots_of(context.positions), self.slots)
    latents = self.latents
    if latents is not None:
      latents = latents.at[:, slots].set(context.x, mode="drop")
    return self.replace(
      kv=self.kv.put(slots, kv),
      positions=self.positions.at[slots].set(context.positions, mode="drop"),
      latents=latents,
    )

  def slots_of(self, positions: Positions) -> jax.Array:
    """Returns the slot of each frame of a block; out of range for those that do not fit."""
    sink, ring = self.method.sink, self.slots - self.method.sink
    # max(): where the sink is all there is no ring, and its modulus would be 0
    in_ring = sink + (positions - sink) % max(ring, 1)
    # of a block longer than the ring only the last frames stay, or two would share a slot
    kept = positions > positions[-1] - ring
    outside = self.slots
    return jnp.where(positions < min(sink, outside), positions, jnp.where(kept, in_ring, outside))

  def over_blocks(self, step: Callable, carry: Any, xs: Any, first: int = 0):
    """Scans step(carry, (n, x)) -> (carry, out) over blocks from number `first` on.

    xs: their inputs, stacked. Returns (carry, outs), stacked.
    """
    count = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.scan(step, carry, (first + jnp.arange(count), xs))

  # to compute the K/V again

  def blocks_before(self, n) -> tuple[jax.Array, jax.Array]:
    """Returns the blocks that slots may hold before block n, oldest first, and which of them count.

    They are the sink's, and the last before n: one more than fits, as block n - 1 may not be
    written yet. Of the latter, those that are in the sink do not count.
    """
    k = self.method.block
    head, tail = -(-min(self.method.sink, self.slots) // k), -(-self.slots // k) + 1
    order = jnp.concatenate([jnp.arange(head), n - tail + jnp.arange(tail)])
    return order, (jnp.arange(head + tail) < head) | (order >= head)

  def kept_latents(self, positions: Positions) -> tuple[Block, jax.Array]:
    """Returns the latents [b k h w c] of a block's slots, and which of its frames they hold."""
    slots = jnp.minimum(self.slots_of(positions), self.slots - 1)  # clipped for reading
    return self.latents[:, slots], self.positions[slots] == positions

  def emptied(self) -> "Ring":
    """Returns a past of the same size that holds nothing and keeps no latents."""
    kv = jax.tree.map(jnp.zeros_like, self.kv)
    return self.replace(kv=kv, positions=jnp.full_like(self.positions, -1), latents=None)
