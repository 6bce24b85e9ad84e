"""A network's forward over groups of frames, and what each group sees.

    Network.apply(params, groups, texts, past) -> Out(velocity of each group, K/V of each group)

A group is a block of frames that share a text and see the same things: itself, some of the K/V that
earlier forwards left (`past`), and other groups of the same forward. So no loop makes a mask: it
says what is read, and the network decides how (a slice, a row of slots, a mask).
"""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from hiar_jax.types import Array, Block, Params


@flax.struct.dataclass
class Read:
  """Frames that a group sees: of an entry of the past, or of another group of the same forward.

  frames: (first, end) of the source, known when the program is traced; None = all.
  seen: which of these frames, where that is known only when it runs (a ring's slots); None = all.
  """

  past: int | None = flax.struct.field(pytree_node=False, default=None)
  group: int | None = flax.struct.field(pytree_node=False, default=None)
  frames: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
  seen: Bool[Array, "p"] | None = None


@flax.struct.dataclass
class Frames:
  """A group of frames: noisy ones, or a context whose K/V are wanted.

  sigma: noise level, of all, of each example, or of each frame. positions: frame indices, of all
  examples or of each. reads: what it sees besides itself. exists: frames that are there; the others
  are seen by nobody but themselves; None = all. text: index into the forward's texts, None: no
  cross-attention. projection: name of the input projection, which sets the kernel (FramePack).
  """

  x: Block
  sigma: Float[Array, ""] | Float[Array, "b"] | Float[Array, "b k"]
  positions: Int[Array, "k"] | Int[Array, "b k"]
  reads: tuple[Read, ...] = ()
  exists: Bool[Array, "k"] | None = None
  text: int | None = flax.struct.field(pytree_node=False, default=0)
  projection: str = flax.struct.field(pytree_node=False, default="patch_embedding")


class KV(Protocol):
  """Keys (rotated) and values of frames, in the layout of the network that made them; a pytree."""

  def put(self, slots: Int[Array, "k"], new: "KV") -> "KV":
    """Returns this with `new` at `slots`, in this one's dtype; out-of-range slots are dropped."""

  def frames(self, first: int, end: int) -> "KV":
    """Returns the K/V of frames first ... end - 1."""

  def moved(self, distance: jax.Array) -> "KV":
    """Returns the K/V with keys rotated on by `distance` frames, a scalar >= 0."""


@flax.struct.dataclass
class Out:
  """Of each group: its velocity [b k h w c], float32 (None of packed frames), and its K/V."""

  velocity: tuple[Block | None, ...]
  kv: tuple[Any, ...]


class Network(Protocol):
  """A diffusion transformer; one class per base, frozen and hashable: a config with methods."""

  def apply(self, params: Params, groups: tuple[Frames, ...], texts, past=(), start=None) -> Out:
    """Runs the groups. texts: [g b l d], or `encode_text` of them. past: K/V, each indexed by Read.

    start: [b], frames of its video before each clip.
    """

  def encode_text(self, params: Params, texts: Float[Array, "g b l d"]) -> Any:
    """Returns the texts as the layers' cross-attention wants them, to be kept per prompt."""

  def empty_kv(self, frames: int, batch: int, height: int, width: int) -> Any:
    """Returns zeros for the K/V of `frames` frames."""


@flax.struct.dataclass
class Bound:
  """A network with weights, texts and starts inside: the function that rollouts and losses call.

  bound(groups, past=()) -> Out. A pytree, so jax.lax.stop_gradient(bound) is its frozen side.
  """

  network: Network = flax.struct.field(pytree_node=False)
  params: Params
  texts: Any  # [g b l d], or network.encode_text of them
  start: jax.Array | None = None

  def __call__(self, groups: tuple[Frames, ...], past=()) -> Out:
    return self.network.apply(self.params, groups, self.texts, past, self.start)

  def with_texts(self, texts) -> "Bound":
    return dataclasses.replace(self, texts=texts)


def bind(network: Network, params: Params, text: Float[Array, "b l d"], start=None) -> Bound:
  """Returns the network bound to one text for all groups."""
  return Bound(network, params, jnp.asarray(text)[None], start)
