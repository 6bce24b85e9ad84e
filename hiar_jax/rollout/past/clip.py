"""The past of a whole clip: K/V block by block as they come, for rollouts of training.

A clip's blocks are known while the program is traced, so a loop over them is unrolled and each
forward is given what its groups see and no more: no slots that are hidden or empty, no mask, and
K/V of the contexts that the exit step goes on with. A ring has one shape for every block, so that
it can be carried through a scan over any number of them.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import KV, Frames, Read
from hiar_jax.rollout.past.clip_groups import clip_reads
from hiar_jax.rollout.past.kinds import kind


@flax.struct.dataclass
class ClipPast:
  """kv: K/V of each block's context, from the first block on; contexts: the frames themselves."""

  method: MethodConfig = flax.struct.field(pytree_node=False)
  kv: tuple[KV, ...] = ()
  contexts: tuple[Frames, ...] = ()

  def visible(self, method: MethodConfig, query, key):
    """As Ring.visible."""
    return kind(method).visible(method, query, key)

  def read(self, groups: tuple[Frames, ...]) -> tuple[tuple[Frames, ...], tuple[KV, ...]]:
    """Returns the groups, each a block, with what they read, and the K/V of blocks that any reads.

    Positions must be known while the program is traced: numpy's.
    """
    of_group = [int(g.positions[-1]) // self.method.block for g in groups]
    sources = {m: Read(past=m) for m in range(len(self.kv))}
    reads = [clip_reads(self.method, n, sources) for n in of_group]
    used = sorted({read.past for found in reads for read in found})
    places = {m: i for i, m in enumerate(used)}
    groups = tuple(
      g.replace(
        reads=(*(read.replace(past=places[read.past]) for read in found), *g.reads),
        packed=self._packed(n),
      )
      for g, n, found in zip(groups, of_group, reads, strict=True)
    )
    return groups, tuple(self.kv[m] for m in used)

  def _packed(self, n: int) -> tuple[Frames, ...]:
    if not self.contexts:
      return ()
    latents = jnp.concatenate([c.x for c in self.contexts], axis=1)
    # all contexts of a sweep are at one level
    return kind(self.method).packed(self.method, n, latents, self.contexts[-1].sigma)

  def write(self, kv: KV, context: Frames, keep: bool = True) -> "ClipPast":
    """Appends a block's context."""
    assert keep is True, "a clip's blocks are all there"
    return self.replace(kv=(*self.kv, kv), contexts=(*self.contexts, context))

  def over_blocks(self, step: Callable, carry: Any, xs: Any, first: int = 0):
    """As Ring.over_blocks, unrolled: the numbers of blocks are ints."""
    outputs = []
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
      carry, out = step(carry, (first + i, jax.tree.map(lambda leaf: leaf[i], xs)))  # noqa: B023
      outputs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)
