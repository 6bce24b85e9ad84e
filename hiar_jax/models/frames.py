"""A network's forward over groups of frames, and what each group sees.

    Network.apply(params, groups, texts, past) -> Out(velocity of each group, K/V of each group)

A group is a run of frames that hear one text and see the same things: themselves, some of the K/V
that earlier forwards left (the past), and other groups of the same forward. Rollouts and losses say
what is read; how (a mask, a slice, a kernel) is the network's matter. So one network serves as

    bidirectional     one group of all frames
    block-causal      a group a block, each reading the groups before it
    teacher-forcing   the context's K/V as the past of noisy groups
    cached            a ring of K/V as the past, read by slots
"""

import dataclasses
import functools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from hiar_jax.attention.views import Views, simplified, view
from hiar_jax.parallel.mesh import Splits
from hiar_jax.parallel.rules import Rules
from hiar_jax.types import Array, Block, Params, Text

PROJECTION = "patch_embedding"  # one frame a token


@flax.struct.dataclass
class Read:
  """Frames that a group sees, of an entry of the past or of another group of the same forward.

  frames: (first, end) of the source's frames, known while the program is traced; None = all.
  seen: a bool for each of them, where that is known only when the program runs (a ring's slots).
  """

  past: int | None = flax.struct.field(pytree_node=False, default=None)
  group: int | None = flax.struct.field(pytree_node=False, default=None)
  frames: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
  seen: Bool[Array, "p"] | None = None


@flax.struct.dataclass
class Frames:
  """A group of frames: noisy ones, or a context whose K/V are wanted.

  x: latents [b k h w c]. sigma: noise level, a scalar, [b] or [b k]. positions: frame indices, [k]
  or [b k]. reads: what the group sees besides itself. exists: which frames are there; the others
  are seen by nobody but themselves; None = all. text: index into the texts of the forward; None: it
  hears none. projection: name of the input projection, which sets how many frames, rows and columns
  become one token (packed history). packed: packed frames that this group alone sees, and that see
  each other alone; `exists` and the one noise level of each count, its reads do not.
  """

  x: Block
  sigma: Float[Array, ""] | Float[Array, "b"] | Float[Array, "b k"]
  positions: Int[Array, "k"] | Int[Array, "b k"]
  reads: tuple[Read, ...] = ()
  exists: Bool[Array, "k"] | None = None
  text: int | None = flax.struct.field(pytree_node=False, default=0)
  projection: str = flax.struct.field(pytree_node=False, default=PROJECTION)
  packed: tuple["Frames", ...] = ()


class KV(Protocol):
  """Keys (rotated) and values of frames, in the layout of the network that made them: a pytree."""

  def put(self, slots: Int[Array, "k"], new: "KV") -> "KV":
    """Returns this with `new` at `slots`, in this one's dtype; out-of-range slots are dropped."""

  def take(self, first: int, end: int) -> "KV":
    """Returns the K/V of the frames first ... end - 1."""

  def moved(self, distance: jax.Array) -> "KV":
    """Returns this with keys rotated on by `distance` frames, a scalar >= 0."""


@flax.struct.dataclass
class Out:
  """Of each group: its velocity [b k h w c], float32 (None of packed frames), and its K/V."""

  velocity: tuple[Block | None, ...]
  kv: tuple[Any, ...]


class Network(Protocol):
  """A diffusion transformer. One class per base: the frozen, hashable dataclass of its sizes.

  A kind of network is two classes: this one, and the group `model` of an experiment, which makes it
  (models.registry). Names of parameters are the file format of checkpoints.
  """

  kind: str  # the folder of its weights in a directory of converted ones
  sizes: tuple[str, ...]  # the fields that decide names and shapes of parameters
  # the fields that change no number beyond rounding: a run may go on with others
  free: tuple[str, ...]
  channels: int  # of latents
  text_dim: int
  dtype: str  # of matrix products and K/V
  # the mesh axes of its parameters, by their paths, and of its K/V stacked over noise levels, as
  # "past/kv/*"
  sharding_rules: Rules
  patch: tuple[int, int, int]  # frames (1), rows and columns of a token
  reads_start: bool  # whether `apply` reads `start`

  def init(self, key: jax.Array) -> Params:
    """Returns random parameters (float32); under jax.eval_shape their shapes alone."""

  def apply(self, params: Params, groups: tuple[Frames, ...], texts, past=(), start=None) -> Out:
    """Runs the groups. texts: [g b l d]. past: tuple of K/V, which a Read's `past` counts.

    start: [b], frames of its video before each clip, or None. A network with distilled guidance
    also takes guidance=[b], scales of which the velocity is the guided one.
    """

  def empty_kv(self, frames: int, batch: int, height: int, width: int) -> Any:
    """Returns zeros for the K/V of frames of height x width."""

  def tokens(self, height: int, width: int) -> int:
    """Returns the tokens of one latent frame."""

  def matrix_axes(self, path: tuple[str, ...], ndim: int) -> tuple[int, int] | None:
    """Returns the (input, output) axes of a parameter that Muon moves, None for AdamW."""

  def unavailable_on(self, platform: str) -> str:
    """Returns why the network cannot run on a platform ("cpu", "gpu", "tpu"); '' where it can."""

  def splits(self, height: int) -> Splits:
    """Returns what the mesh axes `tensor`, `sequence` and `ring` split; height: of the latents.

    The tokens of a frame need no entry: `ring` x `sequence` divides them in any case.
    """

  def packed(self, pools: tuple[int, ...], guided: bool = False) -> "Network":
    """Returns the network with an input projection for packed frames of each kernel, a `packed_kP`
    that a group's `projection` names; guided: and an embedding of guidance scales. Raises UserError
    where it has no such thing.
    """

  def with_projections(self, params: Params) -> Params:
    """Returns parameters with the packed projections that they lack, which begin as average pooling
    before the patch embedding, and the guidance embedding, which begins as zero.
    """


@functools.cache
def abstract_weights(network: Network, dtype: str = "float32") -> Params:
  """Returns the shapes of a network's weights."""
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


@flax.struct.dataclass
class Bound:
  """A network with its weights, texts and starts: the function that rollouts and losses call.

  bound(groups, past=()) -> Out. A pytree, so jax.lax.stop_gradient(bound) is its frozen side.
  texts: [g b l d]. guidance: scales [b], of a network with distilled guidance; None: it predicts
  the velocity of its text alone.
  """

  network: Network = flax.struct.field(pytree_node=False)
  params: Params
  texts: jax.Array
  start: jax.Array | None = None
  guidance: jax.Array | None = None

  def __call__(self, groups: tuple[Frames, ...], past=()) -> Out:
    told = {} if self.guidance is None else {"guidance": self.guidance}
    return self.network.apply(self.params, groups, self.texts, past, self.start, **told)

  @property
  def batch(self) -> int:
    return self.texts.shape[1]

  def with_texts(self, texts: jax.Array) -> "Bound":
    """Returns the same with other texts [g b l d]."""
    return dataclasses.replace(self, texts=texts)


def bind(network: Network, params: Params, text: Text, start=None, guidance=None) -> Bound:
  """Returns the network bound to one text [b l d] for all groups. start: see Network.apply;
  guidance: see Bound.
  """
  start = start if start is None else jnp.asarray(start)
  return Bound(network, params, jnp.asarray(text)[None], start, guidance)


def whole_clip(x: Block, sigma) -> tuple[Frames, ...]:
  """Returns a clip [b f h w c] as the one group of a forward: all frames see each other; sigma as
  Frames.
  """
  return (Frames(x, sigma, jnp.arange(x.shape[1], dtype=jnp.int32)),)


def frame_levels(sigma, x: Block) -> Float[Array, "b k"]:
  """Returns the noise level of each frame of x; sigma as in Frames."""
  sigma = jnp.asarray(sigma, jnp.float32)
  sigma = sigma[:, None] if sigma.ndim == 1 else sigma
  return jnp.broadcast_to(sigma, x.shape[:2]) if sigma.ndim else jnp.full(x.shape[:2], sigma)


# -------------------------------------------------------------------------------- reads as views


def frame_views(groups: tuple[Frames, ...], past_frames: tuple[int, ...]) -> Views:
  """Returns what the groups see of [past | all groups], in frames; () where all see everything.

  past_frames: the frames of each entry of the past. Runs are static; a view has a row where it is
  known only when the program runs which frames are there. What frames see that do not exist is of
  no account. Raises ValueError for a read of what is not there.
  """
  sizes = [g.x.shape[1] for g in groups]
  ends = np.cumsum(sizes).tolist()
  views = [
    view((end - k, end), sources)
    for end, k, sources in zip(ends, sizes, seen_frames(groups, past_frames), strict=True)
  ]
  return simplified(tuple(views), sum(past_frames) + sum(sizes))


def seen_frames(groups: tuple[Frames, ...], past_frames: tuple[int, ...]) -> list[list]:
  """Returns for each group which frames it sees of each entry of the past and of each group: a
  Bool[k] of every source, numpy's where that is static. Raises ValueError as frame_views.
  """
  sizes = [g.x.shape[1] for g in groups]
  for read in (read for group in groups for read in group.reads):
    _check_read(read, sizes, past_frames)
  found = []
  for j, group in enumerate(groups):
    sources = [_seen(group.reads, "past", i, p) for i, p in enumerate(past_frames)]
    for i, (other, k) in enumerate(zip(groups, sizes, strict=True)):
      seen = np.ones(k, bool) if i == j else _seen(group.reads, "group", i, k)
      unread = isinstance(seen, np.ndarray) and not seen.any()
      there = None if unread else other.exists
      if i == j and isinstance(there, np.ndarray) and not there.any():
        there = None  # queries see something in any case
      sources.append(seen if there is None else seen & there)
    found.append(sources)
  return found


def _check_read(read: Read, sizes: list[int], past_frames: tuple[int, ...]) -> None:
  """Raises ValueError for a read of what is not there: as a mask it would be dropped in silence."""
  kind, index, found = ("past", read.past, past_frames)
  if read.past is None:
    kind, index, found = ("group", read.group, sizes)
  if index is None or not 0 <= index < len(found):
    raise ValueError(f"a group reads {kind} {index}, of which there are {len(found)}")
  first, end = read.frames or (0, found[index])
  if not 0 <= first < end <= found[index] and found[index]:
    raise ValueError(
      f"a group reads frames {first} to {end - 1} of {kind} {index}, which has {found[index]}"
    )
  if read.seen is not None and (read.frames or read.seen.shape != (found[index],)):
    raise ValueError(
      f"a group reads {kind} {index} by `seen`: expected one bool for each of its {found[index]} "
      f"frames and no `frames`, got {read.seen.shape} and {read.frames}"
    )


def _seen(reads: tuple[Read, ...], kind: str, index: int, frames: int):
  """Returns which frames of a source are read: Bool[frames], numpy where that is static."""
  row = np.zeros(frames, bool)
  for read in reads:
    if getattr(read, kind) == index:
      if read.seen is not None:
        return read.seen  # of a ring, read once and as a whole
      row[slice(*(read.frames or (0, frames)))] = True
  return row
