"""Step-first order as a pipe: all noise levels work at once, each on the block that follows the
next level's.

    tick d:  level j denoises block d - j, and shows block d - j - 1 to it, in one forward;
             latents move one level on

What a block sees at a level depends on earlier blocks at that level alone, so the numbers are those
of rollout.step_first, whose loops are walked along the diagonals. Every array of a `Pipe` that
belongs to a level has a leading axis of levels and `tick` maps over it: on one device a batched
forward; with that axis sharded over devices a pipeline, whose only communication is one block's
latents a tick.

Nothing grows: caches are rings, and frames are counted from the video's start by integers that
models.rope turns exactly, so numbers far on are those of a window freshly built. While the pipe
fills, levels work on blocks that do not exist: their results are finite, and nobody sees them.
"""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.method import Method
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
from hiar_jax.types import Block, Key, Positions, Text, Texts, Video

Network = Callable[[Text | Texts], Forward]  # models.dit.bind without its text


@flax.struct.dataclass
class PipelineState:
  """A generation under way. `s` levels; `r` = s + 1 texts, block n's at n % r.

  latents: [s b k h w c], what each level is to denoise; before a tick, level 0 holds the block that
  left in the last one.
  context: [s b k h w c], what each level has just made and not yet shown; None where the history is
  at the input level.
  cache: [s ...], what each level has shown; shown: [s b slots h w c], the latents behind it, for
  showing them again.
  texts: [r b l d]; anew: [r], whether the history is shown again under a block's text before that
  block sees it.
  block: the next block to enter; first: the first one that was not given. key, seed [b]: of the
  noise.
  """

  latents: jax.Array
  context: jax.Array | None
  cache: Cache
  contexts: jax.Array
  texts: jax.Array
  recache: jax.Array
  block: jax.Array
  first: jax.Array
  key: Key
  seed: jax.Array

  @property
  def levels(self) -> int:
    return self.latents.shape[0]


@dataclasses.dataclass(frozen=True)
class PipelineMethod:
  """How a pipe works: the method, its levels [s + 1], and whether the sink is seen at its
  `absolute` positions or at ones `relative` to the window.
  """

  method: Method
  sigmas: tuple[float, ...]
  sink_positions: str = "absolute"

  def __post_init__(self):
    if self.method.order != "step_first":
      raise UserError(
        f"history.order = {self.method.order!r} cannot be streamed level by level: a block "
        "starts only when the one before it is done, "
        "so there is never more than one to work on; generate whole videos with it (python -m "
        "hiar_jax.generate), or use a step_first model"
      )
    if self.sink_positions not in relative_sink.POSITIONS:
      raise UserError(
        f"sink_positions = {self.sink_positions!r}: expected one of "
        f"{', '.join(relative_sink.POSITIONS)}"
      )
    if self.carries:
      relative_sink.check(self.method)

  @property
  def carries(self) -> bool:
    return self.sink_positions == "relative" and self.method.sink > 0 and self.method.window > 0

  @property
  def levels(self) -> int:
    return len(self.sigmas) - 1

  @property
  def fused(self) -> bool:
    """Whether a block is shown by a forward of its own; at the input level the one that denoises it
    has shown it.
    """
    return self.method.level != "input"


# -------------------------------------------------------------------------------------------- start


def empty(
  plan: PipelineMethod,
  config: DiTConfig,
  text: Text,
  key: Key,
  seed: jax.Array,
  *,
  frames: int,
  height: int,
  width: int,
) -> PipelineState:
  """A pipe that nothing has entered.

  frames: longest video; with a window the sizes do not depend on it. text: [b l d].
  """
  cache = caches.empty(
    config, plan.method, batch=text.shape[0], frames=frames, height=height, width=width
  )
  block = jnp.zeros((plan.levels, text.shape[0], plan.method.block, height, width, config.channels))
  return PipelineState(
    latents=block,
    context=block if plan.fused else None,
    cache=_each_level(cache, plan.levels),
    contexts=jnp.zeros((*block.shape[:2], cache.slots, *block.shape[3:])),
    texts=jnp.zeros((plan.levels + 1, *text.shape), text.dtype),
    recache=jnp.zeros(plan.levels + 1, bool),
    block=jnp.zeros((), jnp.int32),
    first=jnp.zeros((), jnp.int32),
    key=key,
    seed=seed,
  )


def _each_level(tree, levels: int):
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (levels, *leaf.shape)), tree)


def prefill(
  plan: PipelineMethod, network: Network, pipe: PipelineState, given: Video, texts: jax.Array
) -> PipelineState:
  """Shows given clean frames to every level of an empty pipe: whole blocks, or a picture's one
  frame (see rollout.first_frame).

  texts: [n b l d], one for each given block.
  """
  method, k = plan.method, plan.method.block
  picture = given.shape[1] == 1 and k > 1
  if given.shape[1] % k and not picture:
    raise UserError(f"{given.shape[1]} given latent frames: expected one, or whole blocks of {k}")
  cache, contexts = jax.tree.map(lambda leaf: leaf[0], (pipe.cache, pipe.contexts))

  def one(carry, inputs):
    cache, contexts = carry
    n, x, text = inputs
    positions = jnp.asarray([k - 1], jnp.int32) if picture else block_positions(n, method)
    slots = caches.slots_of(positions, cache.slots, method.sink)
    return (
      _write_context(plan, network(text), cache, x, positions),
      _put(contexts, x, slots, axis=1),
    ), None

  first = jnp.asarray(-(-given.shape[1] // k), jnp.int32)
  pipe = pipe.replace(block=first, first=first)
  if not cache.slots:
    return pipe
  blocks = given[None] if picture else split_blocks(given, method)
  (cache, contexts), _ = jax.lax.scan(
    one, (cache, contexts), (jnp.arange(blocks.shape[0]), blocks, texts)
  )
  cache, contexts = _each_level((cache, contexts), plan.levels)
  return pipe.replace(cache=cache, contexts=contexts)


def _write_context(
  plan: PipelineMethod, forward: Forward, cache: Cache, x: Block, positions: Positions
) -> Cache:
  past, mask = _past(plan, cache, positions, positions[:0])
  own = jnp.ones((positions.size, positions.size), bool)
  _, kv = forward(x, 0.0, positions, mask=jnp.concatenate([mask, own], axis=1), past=past)
  return caches.write(cache, kv, positions, plan.method)


# --------------------------------------------------------------------------------------------- tick


def tick(
  plan: PipelineMethod,
  network: Network,
  noise: Noise,
  pipe: PipelineState,
  text: Text,
  recache: jax.Array,
) -> tuple[PipelineState, Block]:
  """One forward of every level; a block of pure noise enters with its `text`, and the block that
  left the last level is returned.

  That one is block `pipe.block - (s - 1)`, and means nothing while that is less than `pipe.first`.
  anew: see Pipe.
  """
  slot = pipe.block % pipe.texts.shape[0]
  pipe = pipe.replace(
    texts=pipe.texts.at[slot].set(text), recache=pipe.recache.at[slot].set(recache)
  )
  sigmas, level = jnp.asarray(plan.sigmas, jnp.float32), jnp.arange(pipe.levels)
  noisy = jnp.where(level.reshape(-1, 1, 1, 1, 1, 1) == 0, noise(0, pipe.block)[None], pipe.latents)

  def one(level, x, context, cache, contexts):
    n = pipe.block - level
    step = Step(sigmas[level], sigmas[level + 1], block_positions(jnp.maximum(n, 0), plan.method))
    work = _fused if plan.fused else _alone
    v, cache, contexts = work(plan, network, pipe, n, step, x, context, cache, contexts)
    x_next, x0 = renoise(plan.method, x, v, step, lambda: noise(level + 1, n))
    return (
      x_next,
      context_latent(plan.method, x, x_next, x0) if plan.fused else None,
      cache,
      contexts,
    )

  x_next, context, cache, contexts = jax.vmap(one)(
    level, noisy, pipe.context, pipe.cache, pipe.contexts
  )
  latents = jnp.roll(x_next, 1, axis=0)
  return pipe.replace(
    latents=latents, context=context, cache=cache, contexts=contexts, block=pipe.block + 1
  ), latents[0]


def _fused(
  plan: PipelineMethod,
  network: Network,
  pipe: PipelineState,
  n,
  step: Step,
  x: Block,
  context: Block,
  cache: Cache,
  contexts: jax.Array,
):
  """[context of block n - 1 | noisy block n] in one forward (HiAR, section 3.3)."""
  method, k, texts = plan.method, plan.method.block, pipe.texts
  before = jnp.maximum(step.positions - k, 0)
  there = n > pipe.first  # whether block n - 1 came through this pipe
  past, mask = _past(plan, cache, before, step.positions)
  own, seen = jnp.ones((k, k), bool), past_mask(step.positions, before, method) & there
  mask = jnp.concatenate([mask, jnp.concatenate([own, seen]), jnp.concatenate([~own, own])], axis=1)
  earlier = jnp.where(pipe.recache[n % texts.shape[0]], n, n - 1)
  text = jnp.stack([texts[earlier % texts.shape[0]], texts[n % texts.shape[0]]], axis=1)
  sigmas = jnp.stack([method.context_sigma(step.sigma, step.sigma_next), step.sigma])
  levels = jnp.broadcast_to(jnp.repeat(sigmas, k)[None], (x.shape[0], 2 * k))
  positions = jnp.concatenate([before, step.positions])
  v, kv = network(text)(
    jnp.concatenate([context, x], axis=1), levels, positions, mask=mask, past=past
  )
  kv = jax.tree.map(lambda leaf: leaf[:, :, :k], kv)
  return v[:, k:], *_store(plan, cache, contexts, kv, context, before, there)


def _alone(
  plan: PipelineMethod,
  network: Network,
  pipe: PipelineState,
  n,
  step: Step,
  x: Block,
  context: None,
  cache: Cache,
  contexts: jax.Array,
):
  """Block n's forward; what it computes of itself is what its successors read (SAF)."""
  past, mask = _past(plan, cache, step.positions[:0], step.positions)
  own = jnp.ones((x.shape[1], x.shape[1]), bool)
  text = pipe.texts[n % pipe.texts.shape[0]]
  v, kv = network(text)(
    x, step.sigma, step.positions, mask=jnp.concatenate([mask, own], axis=1), past=past
  )
  return v, *_store(plan, cache, contexts, kv, x, step.positions, n >= pipe.first)


def _past(
  plan: PipelineMethod, cache: Cache, before: Positions, now: Positions
) -> tuple[KV, jax.Array]:
  """What the queries at `before` and those at `now` (one may be empty) read of a cache: K/V, mask
  [before + now, past].

  A carried sink stands at another distance from each of the two: the cache's own slots are turned
  for `before`, a copy for `now`.
  """
  method = plan.method
  queries = jnp.concatenate([before, now])
  mask = past_mask(queries, cache.position, method)
  if not plan.carries or not cache.slots:
    return cache.kv, mask
  sink = method.sink
  keys, values = cache.kv.k, cache.kv.v
  is_now = (jnp.arange(queries.size) >= before.size)[:, None]
  parts, copies, masks = [keys[:, :, sink:]], [values[:, :, sink:]], [mask[:, sink:]]
  for positions, rows in ((before, ~is_now), (now, is_now)):
    if positions.size:
      parts.append(
        relative_sink.rotate(keys[:, :, :sink], relative_sink.distance(positions, method))
      )
      copies.append(values[:, :, :sink])
      masks.append(mask[:, :sink] & rows)
  return KV(jnp.concatenate(parts, axis=2), jnp.concatenate(copies, axis=2)), jnp.concatenate(
    masks, axis=1
  )


def _store(
  plan: PipelineMethod,
  cache: Cache,
  contexts: jax.Array,
  kv: KV,
  latents: Block,
  positions: Positions,
  there,
) -> tuple[Cache, jax.Array]:
  """The cache and the latents behind it with one more block, where it is `there`."""
  if not cache.slots:
    return cache, contexts
  slots = jnp.where(there, caches.slots_of(positions, cache.slots, plan.method.sink), cache.slots)
  cache = Cache(
    jax.tree.map(lambda old, new: _put(old, new, slots, axis=2), cache.kv, kv),
    _put(cache.position, positions, slots, axis=0),
  )
  return cache, _put(contexts, latents, slots, axis=1)


def _put(old: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
  """`new` at `slots` of an axis; slots that are out of range are left out."""
  return old.at[(slice(None),) * axis + (slots,)].set(new.astype(old.dtype), mode="drop")


# --------------------------------------------------------------------------------------- show again


def recache(
  plan: PipelineMethod, network: Network, pipe: PipelineState, text: Text, due: jax.Array
) -> PipelineState:
  """The history of the levels `due` [s] encoded again, from its latents, under the text of the
  block that each level sees next.

  Block after block, each seeing those before it that are still in the cache, as in a window freshly
  built; given frames and a clean sink
  stay clean. text: of the block that enters next.
  """
  if not pipe.contexts.shape[2]:
    return pipe
  texts = pipe.texts.at[pipe.block % pipe.texts.shape[0]].set(text)

  def one(level, cache, contexts, due):
    n = pipe.block - level
    new = _recache_level(
      plan, network(texts[n % texts.shape[0]]), level, n, pipe.first, cache, contexts
    )
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), cache, new)

  cache = jax.vmap(one)(jnp.arange(pipe.levels), pipe.cache, pipe.contexts, due)
  return pipe.replace(cache=cache, texts=texts)


def _recache_level(
  plan: PipelineMethod, forward: Forward, level, n, first, cache: Cache, contexts: jax.Array
) -> Cache:
  """One level's cache before it works on block n."""
  method, k, slots = plan.method, plan.method.block, cache.slots
  sigmas = jnp.asarray(plan.sigmas, jnp.float32)
  sigma = method.context_sigma(sigmas[level], sigmas[level + 1])
  head, tail = -(-min(method.sink, slots) // k), -(-slots // k) + 1
  order = jnp.concatenate([jnp.arange(head), n - tail + jnp.arange(tail)])
  fits = (jnp.arange(head + tail) < head) | (order >= head)

  def block(new: Cache, inputs):
    m, fits = inputs
    positions = block_positions(jnp.maximum(m, 0), method)
    places = jnp.minimum(caches.slots_of(positions, slots, method.sink), slots - 1)
    there = (cache.position[places] == positions) & fits
    levels = jnp.where(positions < first * k, 0.0, sigma)
    past, mask = _past(plan, new, positions, positions[:0])
    own = there[None] | jnp.eye(k, dtype=bool)
    x = contexts[:, places]
    _, kv = forward(
      x,
      jnp.broadcast_to(levels[None], x.shape[:2]),
      positions,
      mask=jnp.concatenate([mask, own], axis=1),
      past=past,
    )
    places = jnp.where(there, places, slots)
    kv = jax.tree.map(lambda old, leaf: _put(old, leaf, places, axis=2), new.kv, kv)
    return Cache(kv, _put(new.position, positions, places, axis=0)), None

  blank = Cache(jax.tree.map(jnp.zeros_like, cache.kv), jnp.full_like(cache.position, -1))
  return jax.lax.scan(block, blank, (order, fits))[0]
