"""Step-first order as a pipeline: all noise levels work at once, each on another block.

A tick is one forward of every level. For s = 3 levels, blocks at each level:

    tick       0   1   2   3   4        level j denoises block n = tick - j, and in the same
    level 0    0   1   2   3   4        forward writes the context of block n - 1 into its cache
    level 1        0   1   2   3        (HiAR, section 3.3); then latents move one level on
    level 2            0   1   2

What a block sees at a level depends on earlier blocks at that level alone, so the results are those
of rollout.step_first, computed along the diagonals of blocks x levels. Arrays of a `PipelineState`
that belong to levels have a leading axis s, and `tick` is a vmap over it: a batched forward on one
device; with that axis sharded over devices, a pipeline whose only communication is the latents of
one block per tick.

Memory does not grow: caches are rings, and models.rope rotates by integer positions exactly, so
results far into a video equal those of a freshly built window. While the pipeline fills, levels
work on blocks that do not exist: their results are finite, and masked or dropped.
"""

import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.models.dit import KV, DiTConfig
from hiar_jax.rollout.blocks import (
  Forward,
  Noise,
  Step,
  block_positions,
  context_latent,
  renoise,
  split_blocks,
)
from hiar_jax.rollout.past import relative_sink
from hiar_jax.rollout.past import ring as caches
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.rollout.past.visibility import past_mask
from hiar_jax.rollout.pipeline import Network, PipelineMethod, PipelineState
from hiar_jax.types import Block, Key, Positions, Text, Video

# -------------------------------------------------------------------------------------------- start


def empty(
  pipeline: PipelineMethod,
  config: DiTConfig,
  text: Text,
  key: Key,
  seed: jax.Array,
  *,
  frames: int,
  height: int,
  width: int,
) -> PipelineState:
  """Returns the state before the first block. text: [b l d], for its shape.

  frames: of the longest video; with a window the sizes do not depend on it.
  """
  method, levels = pipeline.method, pipeline.levels
  cache = caches.empty(
    config, method, batch=text.shape[0], frames=frames, height=height, width=width
  )
  block = jnp.zeros((levels, text.shape[0], method.block, height, width, config.channels))
  return PipelineState(
    latents=block,
    context=block if pipeline.fused else None,
    cache=_each_level(cache, levels),
    contexts=jnp.zeros((*block.shape[:2], cache.slots, *block.shape[3:])),
    texts=jnp.zeros((levels + 1, *text.shape), text.dtype),
    recache=jnp.zeros(levels + 1, bool),
    block=jnp.zeros((), jnp.int32),
    first=jnp.zeros((), jnp.int32),
    key=key,
    seed=seed,
  )


def _each_level(tree, levels: int):
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (levels, *leaf.shape)), tree)


def prefill(
  pipeline: PipelineMethod, network: Network, state: PipelineState, given: Video, texts: jax.Array
) -> PipelineState:
  """Writes given clean frames into the caches of an empty pipeline.

  given: whole blocks, or one frame, an image (rollout.image_to_video). texts: [n b l d], one per
  given block. Raises UserError for other lengths.
  """
  method, k = pipeline.method, pipeline.method.block
  image = given.shape[1] == 1 and k > 1
  if given.shape[1] % k and not image:
    raise UserError(f"{given.shape[1]} given latent frames: expected one, or whole blocks of {k}")
  # clean frames are the same context at every level: computed for one, copied to all
  cache, contexts = jax.tree.map(lambda leaf: leaf[0], (state.cache, state.contexts))

  def write_block(carry, inputs):
    cache, contexts = carry
    n, x, text = inputs
    # an image is the last frame of block 0
    positions = jnp.asarray([k - 1], jnp.int32) if image else block_positions(n, method)
    slots = caches.slots_of(positions, cache.slots, method.sink)
    past, mask = _read_cache(pipeline, cache, positions, positions[:0])
    own = jnp.ones((positions.size, positions.size), bool)
    mask = jnp.concatenate([mask, own], axis=1)  # over [past | own]
    _, kv = network(text)(x, 0.0, positions, mask=mask, past=past)
    cache = caches.write(cache, kv, positions, method)
    return (cache, _set_slots(contexts, x, slots, axis=1)), None

  first = jnp.asarray(-(-given.shape[1] // k), jnp.int32)  # blocks, an image counts as one
  state = state.replace(block=first, first=first)
  if not cache.slots:
    return state
  blocks = given[None] if image else split_blocks(given, method)
  (cache, contexts), _ = jax.lax.scan(
    write_block, (cache, contexts), (jnp.arange(blocks.shape[0]), blocks, texts)
  )
  cache, contexts = _each_level((cache, contexts), pipeline.levels)
  return state.replace(cache=cache, contexts=contexts)


# --------------------------------------------------------------------------------------------- tick


def tick(
  pipeline: PipelineMethod,
  network: Network,
  noise: Noise,
  state: PipelineState,
  text: Text,
  recache: jax.Array,
) -> tuple[PipelineState, Block]:
  """Runs one forward of every level; returns the state and the block that left the last level.

  A block of pure noise enters with its `text`; recache: see PipelineState. The block that leaves is
  number `state.block - (s - 1)`, and without meaning while that is less than `state.first`.
  """
  slot = state.block % state.texts.shape[0]
  state = state.replace(
    texts=state.texts.at[slot].set(text), recache=state.recache.at[slot].set(recache)
  )
  sigmas, level = jnp.asarray(pipeline.sigmas, jnp.float32), jnp.arange(state.levels)
  # level [s] against latents [s b k h w c]: noise at level 0, elsewhere what the last tick left
  noisy = jnp.where(
    level.reshape(-1, 1, 1, 1, 1, 1) == 0, noise(0, state.block)[None], state.latents
  )

  def one_level(level, x, context, cache, contexts):
    n = state.block - level  # negative while the pipeline fills
    positions = block_positions(jnp.maximum(n, 0), pipeline.method)
    step = Step(sigmas[level], sigmas[level + 1], positions)
    denoise = _denoise_after_context if pipeline.fused else _denoise_as_context
    v, cache, contexts = denoise(pipeline, network, state, n, step, x, context, cache, contexts)
    x_next, x0 = renoise(pipeline.method, x, v, step, lambda: noise(level + 1, n))
    context = context_latent(pipeline.method, x, x_next, x0) if pipeline.fused else None
    return x_next, context, cache, contexts

  # the vmapped axis is s; texts and counters are the same for all levels, by closure
  x_next, context, cache, contexts = jax.vmap(one_level)(
    level, noisy, state.context, state.cache, state.contexts
  )
  # Level j's result is the input of level j + 1. The last level's arrives at 0, from where it is
  # returned; the next tick puts noise in its place.
  latents = jnp.roll(x_next, 1, axis=0)
  return state.replace(
    latents=latents, context=context, cache=cache, contexts=contexts, block=state.block + 1
  ), latents[0]


def _denoise_after_context(
  pipeline: PipelineMethod,
  network: Network,
  state: PipelineState,
  n,
  step: Step,
  x: Block,
  context: Block,
  cache: Cache,
  contexts: jax.Array,
):
  """Runs [context of block n - 1 | noisy block n] in one forward (HiAR, section 3.3).

  Returns (velocity of block n, cache and context latents with block n - 1).
  """
  method, k, texts = pipeline.method, pipeline.method.block, state.texts
  before = jnp.maximum(step.positions - k, 0)  # block n - 1
  exists = n > state.first  # block n - 1 went through this pipeline; given ones are cached already
  past, mask = _read_cache(pipeline, cache, before, step.positions)
  # Mask [2 k, past + 2 k] by blocks, rows see columns:
  #                    past                   context of n - 1     noisy n
  #   context n - 1    window (_read_cache)   all                  none
  #   noisy n          window (_read_cache)   window, if exists    all
  own, seen = jnp.ones((k, k), bool), past_mask(step.positions, before, method) & exists
  mask = jnp.concatenate([mask, jnp.concatenate([own, seen]), jnp.concatenate([~own, own])], axis=1)
  # Each half has its block's text; before a block that asks for it, the context has the block's
  # text too, as `recache` gives it to the older history.
  text_of_context = jnp.where(state.recache[n % texts.shape[0]], n, n - 1)
  text = jnp.stack([texts[text_of_context % texts.shape[0]], texts[n % texts.shape[0]]], axis=1)
  sigmas = jnp.stack([method.context_sigma(step.sigma, step.sigma_next), step.sigma])
  levels = jnp.broadcast_to(jnp.repeat(sigmas, k)[None], (x.shape[0], 2 * k))  # [b 2k]
  positions = jnp.concatenate([before, step.positions])
  v, kv = network(text)(
    jnp.concatenate([context, x], axis=1), levels, positions, mask=mask, past=past
  )
  kv = jax.tree.map(lambda leaf: leaf[:, :, :k], kv)  # [num_layers b 2k t a d] -> the context's
  return v[:, k:], *_write_cache(pipeline, cache, contexts, kv, context, before, exists)


def _denoise_as_context(
  pipeline: PipelineMethod,
  network: Network,
  state: PipelineState,
  n,
  step: Step,
  x: Block,
  context: None,
  cache: Cache,
  contexts: jax.Array,
):
  """Runs block n's forward at the input level: its own K/V are its context (SAF).

  Returns (velocity, cache and context latents with block n).
  """
  past, mask = _read_cache(pipeline, cache, step.positions[:0], step.positions)
  own = jnp.ones((x.shape[1], x.shape[1]), bool)
  text = state.texts[n % state.texts.shape[0]]
  v, kv = network(text)(
    x, step.sigma, step.positions, mask=jnp.concatenate([mask, own], axis=1), past=past
  )
  exists = n >= state.first
  return v, *_write_cache(pipeline, cache, contexts, kv, x, step.positions, exists)


def _read_cache(
  pipeline: PipelineMethod, cache: Cache, before: Positions, now: Positions
) -> tuple[KV, jax.Array]:
  """Returns the K/V that queries at `before` and at `now` read; mask [before + now, past].

  One of the two may be empty. A relative sink is at a different distance from each, so there it is
  in the past twice: [ring | sink rotated for `before` | sink rotated for `now`].
  """
  method = pipeline.method
  queries = jnp.concatenate([before, now])
  mask = past_mask(queries, cache.position, method)
  if not pipeline.carries or not cache.slots:
    return cache.kv, mask
  sink = method.sink
  keys, values = cache.kv.k, cache.kv.v  # [num_layers b slots t a d], the sink's slots first
  is_now = (jnp.arange(queries.size) >= before.size)[:, None]
  past_keys, past_values, masks = [keys[:, :, sink:]], [values[:, :, sink:]], [mask[:, sink:]]
  for positions, rows in ((before, ~is_now), (now, is_now)):
    if positions.size:
      past_keys.append(
        relative_sink.rotate(keys[:, :, :sink], relative_sink.distance(positions, method))
      )
      past_values.append(values[:, :, :sink])
      masks.append(mask[:, :sink] & rows)  # each half of the queries sees its own copy
  past = KV(jnp.concatenate(past_keys, axis=2), jnp.concatenate(past_values, axis=2))
  return past, jnp.concatenate(masks, axis=1)


def _write_cache(
  pipeline: PipelineMethod,
  cache: Cache,
  contexts: jax.Array,
  kv: KV,
  latents: Block,
  positions: Positions,
  exists,
) -> tuple[Cache, jax.Array]:
  """Writes a block's K/V and the latents they were computed from, where the block `exists`."""
  if not cache.slots:
    return cache, contexts
  # under vmap a branch would run for all levels anyway: writes of absent blocks go out of range
  slots = caches.slots_of(positions, cache.slots, pipeline.method.sink)
  slots = jnp.where(exists, slots, cache.slots)
  cache = Cache(
    jax.tree.map(lambda old, new: _set_slots(old, new, slots, axis=2), cache.kv, kv),
    _set_slots(cache.position, positions, slots, axis=0),
  )
  return cache, _set_slots(contexts, latents, slots, axis=1)


def _set_slots(old: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
  """Returns `old` with `new` at `slots` of an axis; out-of-range slots are dropped."""
  return old.at[(slice(None),) * axis + (slots,)].set(new.astype(old.dtype), mode="drop")


# ------------------------------------------------------------------------------------------ recache


def recache(
  pipeline: PipelineMethod, network: Network, state: PipelineState, text: Text, due: jax.Array
) -> PipelineState:
  """Encodes the history of the levels `due` [s] again, under the text of each level's next block.

  K/V depend on the text; after a change of prompt the cache still holds the old one's. text: of the
  block that enters next. Block after block, each seeing those before it that are still cached, as
  in a freshly built window; given frames and a clean sink stay at sigma 0.
  """
  if not state.contexts.shape[2]:
    return state
  texts = state.texts.at[state.block % state.texts.shape[0]].set(text)

  def one_level(level, cache, contexts, due):
    n = state.block - level
    forward = network(texts[n % texts.shape[0]])
    new = _recache_level(pipeline, forward, level, n, state.first, cache, contexts)
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), cache, new)

  cache = jax.vmap(one_level)(jnp.arange(state.levels), state.cache, state.contexts, due)
  return state.replace(cache=cache, texts=texts)


def _recache_level(
  pipeline: PipelineMethod, forward: Forward, level, n, first, cache: Cache, contexts: jax.Array
) -> Cache:
  """Returns one level's cache before it works on block n, computed from `contexts`."""
  method, k, slots = pipeline.method, pipeline.method.block, cache.slots
  sigmas = jnp.asarray(pipeline.sigmas, jnp.float32)
  sigma = method.context_sigma(sigmas[level], sigmas[level + 1])
  # The blocks that slots may hold: the sink's, and the last before n (one more than fits, as the
  # ring may begin inside a block). Of the latter, those that are in the sink are skipped.
  head, tail = -(-min(method.sink, slots) // k), -(-slots // k) + 1
  order = jnp.concatenate([jnp.arange(head), n - tail + jnp.arange(tail)])
  valid = (jnp.arange(head + tail) < head) | (order >= head)

  def encode_block(new: Cache, inputs):
    m, valid = inputs
    positions = block_positions(jnp.maximum(m, 0), method)
    # clipped for reading; `exists` says which frames are really in the cache
    places = jnp.minimum(caches.slots_of(positions, slots, method.sink), slots - 1)
    exists = (cache.position[places] == positions) & valid
    levels = jnp.where(positions < first * k, 0.0, sigma)
    past, mask = _read_cache(pipeline, new, positions, positions[:0])
    own = exists[None] | jnp.eye(k, dtype=bool)  # itself always: a softmax needs a key
    x = contexts[:, places]
    _, kv = forward(
      x,
      jnp.broadcast_to(levels[None], x.shape[:2]),
      positions,
      mask=jnp.concatenate([mask, own], axis=1),
      past=past,
    )
    places = jnp.where(exists, places, slots)
    kv = jax.tree.map(lambda old, leaf: _set_slots(old, leaf, places, axis=2), new.kv, kv)
    return Cache(kv, _set_slots(new.position, positions, places, axis=0)), None

  blank = Cache(jax.tree.map(jnp.zeros_like, cache.kv), jnp.full_like(cache.position, -1))
  return jax.lax.scan(encode_block, blank, (order, valid))[0]
