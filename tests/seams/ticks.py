"""Step-first order as a pipeline: all noise levels work at once, each on another block.

    tick(bound, noise, method, state, entering) -> (state, the block that left)

At tick d, level j denoises block d - j. A vmap over levels; state's leaves of levels are [s ...].
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.types import LatentShape
from tests.seams.frames import Bound, Frames
from tests.seams.loops import (
  Step,
  block_positions,
  denoise,
  split_blocks,
  write_context_and_denoise,
)
from tests.seams.method import Method
from tests.seams.ring import Ring


@flax.struct.dataclass
class Entering:
  """The block that enters: its text [b l d], and whether the past is encoded again under it."""

  text: jax.Array
  recache: jax.Array | bool = False


@flax.struct.dataclass
class State:
  """A generation in progress at s levels; texts and recache are rings of s + 1 blocks.

  latents: [s b k h w c], the inputs of the next tick. context: of the blocks just denoised, not in
  the past yet; None where a context is free. block: the next to enter; first: the first not given.
  """

  latents: jax.Array
  context: jax.Array | None
  past: Any
  texts: jax.Array
  recache: jax.Array
  block: jax.Array
  first: jax.Array

  @property
  def levels(self) -> int:
    return self.latents.shape[0]

  def text_of(self, n):
    return self.texts[n % self.texts.shape[0]]

  def recaches(self, n):
    return self.recache[n % self.recache.shape[0]]

  def entered(self, entering: Entering) -> "State":
    slot = self.block % self.texts.shape[0]
    return self.replace(
      texts=self.texts.at[slot].set(entering.text),
      recache=self.recache.at[slot].set(entering.recache),
    )


def empty(bound: Bound, method: Method, shape: LatentShape) -> State:
  """Returns the state before the first block; bound's texts [1 b l d] give the shape."""
  _, batch, *text = bound.texts.shape
  past = method.past.empty(bound.network, method, shape, batch, latents=True)
  block = jnp.zeros((method.levels, batch, *shape.block(method.block)))
  return State(
    latents=block,
    context=None if method.context.free else block,
    past=_each_level(past, method.levels),
    texts=jnp.zeros((method.levels + 1, batch, *text)),
    recache=jnp.zeros(method.levels + 1, bool),
    block=jnp.zeros((), jnp.int32),
    first=jnp.zeros((), jnp.int32),
  )


def _each_level(tree, levels: int):
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (levels, *leaf.shape)), tree)


def prefill(bound: Bound, state: State, given, texts) -> State:
  """Writes given clean frames into every level's past. texts: [n b l d], one a given block."""
  past = jax.tree.map(lambda leaf: leaf[0], state.past)
  method, k = past.method, past.method.block
  image = given.shape[1] % k
  blocks = given[None] if image else split_blocks(given, method)

  def write_block(past, inputs):
    n, x, text = inputs
    # an image is the last frame of block 0
    positions = jnp.asarray([k - 1], jnp.int32) if image else block_positions(n, method)
    _, kv = denoise(bound.with_texts(text[None]), past, x, 0.0, positions)
    return past.write(kv, x, positions), None

  past, _ = jax.lax.scan(write_block, past, (jnp.arange(len(blocks)), blocks, texts))
  first = jnp.asarray(len(blocks), jnp.int32)
  return state.replace(past=_each_level(past, state.levels), block=first, first=first)


def tick(bound: Bound, noise, method: Method, state: State, entering: Entering):
  """Runs one forward of every level; returns (state, the block that left the last level)."""
  state = state.entered(entering)
  level = jnp.arange(state.levels)
  noisy = jnp.where(
    level.reshape(-1, 1, 1, 1, 1, 1) == 0, noise(0, state.block)[None], state.latents
  )

  def one_level(level, x, context, past):
    n = state.block - level  # negative while the pipeline fills
    step = Step(level, jnp.maximum(n, 0), method)
    if method.context.free:
      v, kv = denoise(
        bound.with_texts(state.text_of(n)[None]), past, x, step.sigmas[0], step.positions
      )
      past = past.write(kv, x, step.positions, n >= state.first)
    else:
      # before a block that asks for a recache its context is encoded under its text
      hears = jnp.where(state.recaches(n), n, n - 1)
      texts = jnp.stack([state.text_of(hears), state.text_of(n)])
      # given blocks are in the past already; before the first there is none
      exists = jnp.broadcast_to(n > state.first, method.block)
      positions = jnp.maximum(step.positions - method.block, 0)
      before = Frames(context, step.context_sigma, positions, exists=exists, text=0)
      x_group = Frames(x, step.sigmas[0], step.positions, text=1)
      v, past = write_context_and_denoise(bound.with_texts(texts), past, before, x_group)
    x_next, context, _ = dataclasses.replace(step, n=n).finish(x, v, noise)
    return x_next, None if method.context.free else context, past

  x_next, context, past = jax.vmap(one_level)(level, noisy, state.context, state.past)
  # level j's result is the input of level j + 1; the last one's arrives at 0, and leaves
  latents = jnp.roll(x_next, 1, axis=0)
  state = state.replace(latents=latents, context=context, past=past, block=state.block + 1)
  return state, latents[0]


def recache(bound: Bound, method: Method, state: State, entering: Entering, due) -> State:
  """Encodes the past of the levels `due` [s] again, under the text of each level's next block."""
  state = state.entered(entering)

  def one_level(level, past, due):
    n = state.block - level
    new = _recached(bound.with_texts(state.text_of(n)[None]), past, level, n, state.first)
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), past, new)

  return state.replace(past=jax.vmap(one_level)(jnp.arange(state.levels), state.past, due))


def _recached(bound: Bound, past: Ring, level, n, first) -> Ring:
  method = past.method
  order, meant = past.blocks_before(n)
  sigma = Step(level, n, method).context_sigma

  def encode_block(new: Ring, inputs):
    m, meant = inputs
    positions = block_positions(jnp.maximum(m, 0), method)
    x, there = past.kept_latents(positions)
    exists = there & meant
    clean = first * method.block + (method.clean_sink if not method.context.free else 0)
    sigmas = jnp.broadcast_to(jnp.where(positions < clean, 0.0, sigma), x.shape[:2])
    groups, kept = new.read((Frames(x, sigmas, positions, exists=exists),))
    return new.write(bound(groups, kept).kv[0], x, positions, exists), None

  return jax.lax.scan(encode_block, past.emptied(), (order, meant))[0]
