"""Step-first order as a pipeline: all noise levels work at once, each on another block.

A tick is one forward of every level. For s = 3 levels, blocks at each level:

    tick       0   1   2   3   4        level j denoises block n = tick - j, and in the same
    level 0    0   1   2   3   4        forward writes the context of block n - 1 into its past
    level 1        0   1   2   3        (HiAR, section 3.3); then latents move one level on
    level 2            0   1   2

What a block sees at a level depends on earlier blocks at that level alone, so the results are those
of rollout.step_first, computed along the diagonals of blocks x levels. Arrays of a `PipelineState`
that belong to levels have a leading axis s, and `tick` is a vmap over it: a batched forward on one
device; with that axis sharded over devices, a pipeline whose only communication is the latents of
one block per tick.

Memory does not grow: the past is a ring, and models.rope rotates by integer positions exactly, so
results far into a video equal those of a freshly built window. While the pipeline fills, levels
work on blocks that do not exist: their results are finite, and masked or dropped.
"""

import jax
import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.models.frames import Bound, Frames
from hiar_jax.rollout.blocks import (
  Noise,
  Step,
  blocks_of,
  denoise,
  image_positions,
  is_image,
  split_blocks,
  write_context,
  write_context_and_denoise,
)
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import block_positions
from hiar_jax.rollout.pipeline import PipelineState
from hiar_jax.types import Block, Key, LatentShape, Positions, PyTree, Text, Video


def empty(
  bound: Bound, method: Method, shape: LatentShape, key: Key, seed: jax.Array
) -> PipelineState:
  """Returns the state before the first block. bound: its texts are read for their shape.

  shape: of the longest video; with a window the sizes do not depend on its frames.
  """
  levels, batch = method.levels, bound.batch
  past = kind(method).empty(bound.network, method, shape, batch, latents=True)
  block = jnp.zeros((levels, batch, *shape.block(method.block)))
  return PipelineState(
    latents=block,
    context=None if method.context.free else block,
    past=_each_level(past, levels),
    texts=jnp.zeros((levels + 1, *bound.texts.shape[1:]), bound.texts.dtype),
    recache=jnp.zeros(levels + 1, bool),
    block=jnp.zeros((), jnp.int32),
    first=jnp.zeros((), jnp.int32),
    key=key,
    seed=seed,
  )


def _each_level(tree: PyTree, levels: int) -> PyTree:
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (levels, *leaf.shape)), tree)


def prefill(bound: Bound, state: PipelineState, given: Video, texts: jax.Array) -> PipelineState:
  """Writes given clean frames into the past of every level of an empty pipeline.

  given: whole blocks, or one frame, an image (blocks.prefill). texts: [n b l d], one per given
  block. Raises UserError for other lengths.
  """
  # clean frames are the same context at every level: computed for one, copied to all
  past = jax.tree.map(lambda leaf: leaf[0], state.past)
  method = past.method
  image = is_image(given, method)
  first = jnp.asarray(blocks_of(given, method), jnp.int32)
  state = state.replace(block=first, first=first)
  if not past.slots:
    return state
  blocks = given[None] if image else split_blocks(given, method)

  def write_block(past, inputs):
    n, x, text = inputs
    positions = image_positions(method) if image else block_positions(n, method)
    return write_context(bound.with_texts(text[None]), past, Frames(x, 0.0, positions)), None

  past, _ = jax.lax.scan(write_block, past, (jnp.arange(blocks.shape[0]), blocks, texts))
  return state.replace(past=_each_level(past, state.levels))


# --------------------------------------------------------------------------------------------- tick


def tick(
  bound: Bound, noise: Noise, state: PipelineState, text: Text, recache: jax.Array | bool
) -> tuple[PipelineState, Block]:
  """Runs one forward of every level; returns the state and the block that left the last level.

  A block of pure noise enters. The block that leaves is number `state.block - (s - 1)`, and without
  meaning while that is less than `state.first`. bound: its own texts are not heard. text: of the
  block that enters; recache: see PipelineState.
  """
  slot = state.block % state.texts.shape[0]
  state = state.replace(
    texts=state.texts.at[slot].set(text), recache=state.recache.at[slot].set(recache)
  )
  method, level = state.past.method, jnp.arange(state.levels)
  # level [s] against latents [s b k h w c]: noise at level 0, elsewhere what the last tick left
  noisy = jnp.where(
    level.reshape(-1, 1, 1, 1, 1, 1) == 0, noise(0, state.block)[None], state.latents
  )

  def one_level(level, x, context, past):
    step = Step(method, level, state.block - level)  # a block < 0 while the pipeline fills
    run = _denoise_as_context if method.context.free else _denoise_after_context
    v, past = run(bound, state, step, x, context, past)
    x_next, context, _ = step.finish(x, v, noise)
    return x_next, None if method.context.free else context, past

  # the vmapped axis is s; texts and counters are the same for all levels, by closure
  x_next, context, past = _over_levels(one_level)(level, noisy, state.context, state.past)
  # Level j's result is the input of level j + 1. The last level's arrives at 0, from where it is
  # returned; the next tick puts noise in its place.
  latents = jnp.roll(x_next, 1, axis=0)
  state = state.replace(latents=latents, context=context, past=past, block=state.block + 1)
  return state, latents[0]


def _over_levels(one_level):
  """Maps over noise levels. Where they lie on several devices, a kernel that is mapped by hand
  (attention.splash) is told so; it would get all levels otherwise.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = not mesh.empty and mesh.shape.get("level", 1) > 1
  return jax.vmap(one_level, spmd_axis_name="level" if split else None)


def _denoise_after_context(
  bound: Bound, state: PipelineState, step: Step, x: Block, context: Block, past: Ring
) -> tuple[Block, Ring]:
  """Runs [context of block n - 1 | noisy block n]: (velocity of n, the past with n - 1)."""
  n, k = step.n, step.method.block
  # Each half has its block's text; before a block that asks for it, the context has the block's
  # text too, as `recache` gives it to the older past.
  hears = jnp.where(state.recache[n % state.recache.shape[0]], n, n - 1)
  bound = bound.with_texts(jnp.stack([state.text_of(hears), state.text_of(n)]))
  # block n - 1 went through this pipeline; given ones are in the past already
  exists = jnp.broadcast_to(n > state.first, (k,))
  positions = _positions(step)
  before = Frames(context, step.context_sigma, jnp.maximum(positions - k, 0), exists=exists, text=0)
  return write_context_and_denoise(bound, past, before, Frames(x, step.sigma, positions, text=1))


def _denoise_as_context(
  bound: Bound, state: PipelineState, step: Step, x: Block, context: None, past: Ring
) -> tuple[Block, Ring]:
  """Runs block n's forward, whose own K/V are its context (SAF): (velocity, the past with n)."""
  bound = bound.with_texts(state.text_of(step.n)[None])
  positions = _positions(step)
  group = Frames(x, step.sigma, positions)
  v, kv = denoise(bound, past, group)
  return v, past.write(kv, group, step.n >= state.first)


def _positions(step: Step) -> Positions:
  """Returns the frame indices [k] of a step's block, those of block 0 for one that is not there."""
  return block_positions(jnp.maximum(step.n, 0), step.method)


# ------------------------------------------------------------------------------------------ recache


def recache(bound: Bound, state: PipelineState, text: Text, due: jax.Array) -> PipelineState:
  """Encodes the past of the levels `due` [s] again, under the text of each level's next block.

  K/V depend on the text; after a change of prompt the past still holds the old one's. text: of the
  block that enters next. Block after block, each seeing those before it that are still kept, as in
  a freshly built window; given frames and a clean sink stay at sigma 0.
  """
  if not state.past.latents.shape[2]:
    return state
  slot = state.block % state.texts.shape[0]
  state = state.replace(texts=state.texts.at[slot].set(text))

  def one_level(level, past, due):
    n = state.block - level
    new = _recached(bound.with_texts(state.text_of(n)[None]), past, level, n, state.first)
    old = past.replace(latents=None)  # these stay
    chosen = jax.tree.map(lambda old, new: jnp.where(due, new, old), old, new)
    return chosen.replace(latents=past.latents)

  past = _over_levels(one_level)(jnp.arange(state.levels), state.past, due)
  return state.replace(past=past)


def _recached(bound: Bound, past: Ring, level, n, first) -> Ring:
  """Returns the K/V of one level's past before it works on block n, computed from its latents."""
  method = past.method
  sigma = Step(method, level, n).context_sigma

  def encode_block(new: Ring, inputs):
    m, counts = inputs
    positions = block_positions(jnp.maximum(m, 0), method)
    x, held = past.kept_latents(positions)
    exists = held & counts
    sigmas = jnp.where(positions < first * method.block, 0.0, sigma)
    group = Frames(x, jnp.broadcast_to(sigmas[None], x.shape[:2]), positions, exists=exists)
    _, kv = denoise(bound, new, group)
    return new.write(kv, group, exists), None

  return jax.lax.scan(encode_block, past.emptied(), past.blocks_before(n))[0]
