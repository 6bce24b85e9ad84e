"""The loops: a whole video in either order, and training's rollout to an exit level.

    rollout(bound, noise, method, shape, given=None) -> video
    self_rollout(bound, noise, method, shape, exit_level) -> x0

noise(level, n) -> eps [b k h w c]; levels behind the method's own are the draws of contexts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.types import Block, LatentShape, Video
from tests.seams.frames import Bound, Frames, Read
from tests.seams.method import Method, static_reads
from tests.seams.ring import Ring


@dataclasses.dataclass(frozen=True)
class Step:
  """A denoising step of block n: from `level` to the next. n and level may be traced."""

  level: jax.Array
  n: jax.Array
  method: Method

  @property
  def sigmas(self):
    table = jnp.asarray(self.method.sigmas, jnp.float32)
    return table[self.level], table[self.level + 1]

  @property
  def context_sigma(self):
    return self.method.context.sigma(*self.sigmas)

  @property
  def positions(self):
    return block_positions(self.n, self.method)

  def finish(self, x: Block, v: Block, noise) -> tuple[Block, Block, Block]:
    """Returns (x at the next level, the block's context, its x0) from the velocity v at x."""
    sigma, sigma_next = self.sigmas
    method = self.method
    x0 = flow.x0_from_velocity(x, v, sigma)
    if method.renoise == "euler":
      x_next = flow.euler(x, v, sigma, sigma_next)
    else:
      x_next = flow.add_noise(x0, noise(self.level + 1, self.n), sigma_next)

    def eps():
      return noise(method.levels + 1 + self.level, self.n)

    return x_next, method.context.latent(x, x_next, x0, eps), x0


def block_positions(n, method: Method):
  return n * method.block + jnp.arange(method.block, dtype=jnp.int32)


def split_blocks(video, method: Method):
  b, f, *rest = video.shape
  return jnp.moveaxis(video.reshape(b, f // method.block, method.block, *rest), 1, 0)


def join_blocks(blocks) -> Video:
  n, b, k, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * k, *rest)


# ------------------------------------------------------------------------------------- primitives


def denoise(bound: Bound, past: Ring, x: Block, sigma, positions):
  """Runs a block against the past; returns (velocity, its K/V)."""
  groups, kept = past.read((Frames(x, sigma, positions),))
  out = bound(groups, kept)
  return out.velocity[0], out.kv[0]


def write_context(bound: Bound, past: Ring, x: Block, sigma, positions) -> Ring:
  """Writes the K/V of a block's context into the past."""
  _, kv = denoise(bound, past, x, sigma, positions)
  return past.write(kv, x, positions)


def write_context_and_denoise(bound, past: Ring, before: Frames, x: Frames):
  """Runs [context of block n - 1 | noisy block n] in one forward (HiAR, section 3.3)."""
  seen = past.method.visible(x.positions[-1], before.positions)
  x = x.replace(reads=(Read(group=0, seen=seen),))
  groups, kept = past.read((before, x))
  out = bound(groups, kept)
  keep = True if before.exists is None else before.exists
  return out.velocity[1], past.write(out.kv[0], before.x, before.positions, keep)


# ---------------------------------------------------------------------------------- whole videos


def rollout(bound: Bound, noise, method: Method, shape: LatentShape, given=None) -> Video:
  """Generates shape.frames latent frames after the `given` clean ones.

  given: whole blocks, or one frame, an image, which is the last frame of block 0.
  """
  sink_blocks = method.clean_sink // method.block
  if sink_blocks and given is None:
    # from here on the finished sink is like given frames
    plain = dataclasses.replace(method, sink_context="history")
    head = dataclasses.replace(shape, frames=min(method.clean_sink, shape.frames))
    given = rollout(bound, noise, plain, head)
    shape = dataclasses.replace(shape, frames=shape.frames - head.frames)
    if not shape.frames:
      return given
  batch = jax.tree.leaves(bound.texts)[0].shape[1]
  whole = dataclasses.replace(shape, frames=shape.frames + (0 if given is None else given.shape[1]))
  past, first = method.past.empty(bound.network, method, whole, batch), 0
  if given is not None:
    past, first = prefill(bound, past, given), -(-given.shape[1] // method.block)
  blocks = shape.frames // method.block
  if method.order == "block_first":
    *_, xs = block_first(bound, noise, past, method, blocks, method.levels - 1, first=first)
  else:
    xs = step_first(bound, noise, past, method, blocks, method.levels, first=first)
  video = join_blocks(xs)
  return video if given is None else jnp.concatenate([given, video], axis=1)


def prefill(bound: Bound, past: Ring, given: Video) -> Ring:
  """Writes given clean frames into the past: whole blocks, or an image."""
  method = past.method
  if given.shape[1] % method.block:
    return write_context(bound, past, given, 0.0, jnp.asarray([method.block - 1], jnp.int32))

  def write_block(past, inputs):
    n, x = inputs
    return write_context(bound, past, x, 0.0, block_positions(n, method)), None

  blocks = split_blocks(given, method)
  return jax.lax.scan(write_block, past, (jnp.arange(blocks.shape[0]), blocks))[0]


def step_first(bound, noise, past: Ring, method: Method, blocks: int, stop, *, first=0):
  """Takes `blocks` blocks of noise to level `stop` (may be traced): [n b k h w c]."""
  xs = jax.lax.map(lambda n: noise(0, n), first + jnp.arange(blocks))

  def next_level(level, xs):
    return sweep(bound, noise, past, xs, level, first=first)[0]

  return jax.lax.fori_loop(0, stop, next_level, xs)


def sweep(bound, noise, past: Ring, xs, level, *, first=0):
  """Takes all blocks a level on; returns (xs, contexts, x0s), each [n b k h w c]."""
  method = past.method

  def free(past, inputs):  # the context is the block as it is here: its K/V are done
    n, x = inputs
    step = Step(level, n, method)
    v, kv = denoise(bound, past, x, step.sigmas[0], step.positions)
    return past.write(kv, x, step.positions), step.finish(x, v, noise)

  def fused(carry, inputs):
    past, context = carry  # of block n - 1, not in the past yet
    n, x = inputs
    step = Step(level, n, method)
    before = Frames(context, step.context_sigma, step.positions - method.block)
    x_group = Frames(x, step.sigmas[0], step.positions)
    v, past = write_context_and_denoise(bound, past, before, x_group)
    outputs = step.finish(x, v, noise)
    return (past, outputs[1]), outputs

  indices = first + jnp.arange(xs.shape[0])
  if method.context.free:
    return jax.lax.scan(free, past, (indices, xs))[1]
  step = Step(level, indices[0], method)
  v, _ = denoise(bound, past, xs[0], step.sigmas[0], step.positions)
  head = step.finish(xs[0], v, noise)
  _, tail = jax.lax.scan(fused, (past, head[1]), (indices[1:], xs[1:]))
  return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), head, tail)


def block_first(bound, noise, past: Ring, method: Method, blocks: int, exit_level, *, first=0):
  """Denoises each block through the step at `exit_level` before the next.

  Returns (their inputs at that step, their contexts, their x0), each [n b k h w c].
  """

  def next_block(past, n):
    def predict(level, x):
      step = Step(level, n, method)
      v, _ = denoise(bound, past, x, step.sigmas[0], step.positions)
      return step.finish(x, v, noise)

    x = jax.lax.fori_loop(0, exit_level, lambda j, x: predict(j, x)[0], noise(0, n))
    _, context, x0 = predict(exit_level, x)
    step = Step(exit_level, n, method)
    return write_context(bound, past, context, step.context_sigma, step.positions), (x, context, x0)

  return jax.lax.scan(next_block, past, first + jnp.arange(blocks))[1]


# -------------------------------------------------------------------------------------- training


def self_rollout(bound: Bound, noise, method: Method, shape: LatentShape, exit_level) -> Video:
  """Returns x0 of all blocks at `exit_level`, differentiable through the exit step alone."""
  frozen = jax.lax.stop_gradient(bound)
  blocks = shape.frames // method.block
  if method.context.free:
    return _free_rollout(bound, frozen, noise, method, blocks, exit_level)
  if method.clean_sink:
    raise UserError("a clean sink is trained where a block is its own context alone")
  batch = jax.tree.leaves(bound.texts)[0].shape[1]
  past = method.past.empty(bound.network, method, shape, batch)
  if method.order == "block_first":
    noisy, contexts, _ = block_first(frozen, noise, past, method, blocks, exit_level)
  else:
    noisy = step_first(frozen, noise, past, method, blocks, exit_level)
    _, contexts, _ = sweep(frozen, noise, past, noisy, exit_level)
  noisy, contexts = jax.lax.stop_gradient((noisy, contexts))
  step = Step(exit_level, 0, method)
  sigma = step.sigmas[0]
  kept = ()
  if blocks > 1:
    # nobody sees the last block's context
    kept = bound(causal_groups(contexts[:-1], step.context_sigma, method)).kv
    kept = jax.lax.stop_gradient(kept) if method.gradient == "detached" else kept
  shown = {m: Read(past=m) for m in range(blocks - 1)}
  groups = [
    Frames(noisy[n], sigma, block_positions(n, method), static_reads(method, n, shown))
    for n in range(blocks)
  ]
  return _x0(bound(tuple(groups), kept), noisy, sigma)


def causal_groups(xs, sigma, method: Method) -> tuple[Frames, ...]:
  """Returns blocks [n b k h w c] as groups that see those before them, each at its own level."""
  shown = {m: Read(group=m) for m in range(len(xs))}
  return tuple(
    Frames(x, sigma, block_positions(n, method), static_reads(method, n, shown))
    for n, x in enumerate(xs)
  )


def _x0(out, xs, sigma) -> Video:
  return join_blocks(
    jnp.stack([flow.x0_from_velocity(x, v, sigma) for x, v in zip(xs, out.velocity, strict=True)])
  )


def _free_rollout(bound, frozen, noise, method: Method, blocks: int, exit_level) -> Video:
  """Runs the rollout whose context is the block itself (SAF): one block-causal forward a level."""
  sink = None
  if method.clean_sink and method.clean_sink // method.block < blocks:
    plain = dataclasses.replace(method, sink_context="history")
    sink = jax.lax.stop_gradient(
      _free_rollout(frozen, frozen, noise, plain, method.clean_sink // method.block, exit_level)
    )

  def advance(j, xs):
    x0 = split_blocks(block_causal(frozen, xs, Step(j, 0, method), sink, False), method)
    v = flow.velocity_from_x0(xs, x0, Step(j, 0, method).sigmas[0])
    return jax.vmap(lambda n, x, v: Step(j, n, method).finish(x, v, noise)[0])(
      jnp.arange(blocks), xs, v
    )

  xs = jax.lax.map(lambda n: noise(0, n), jnp.arange(blocks))
  xs = jax.lax.stop_gradient(jax.lax.fori_loop(0, exit_level, advance, xs))
  detached = method.gradient == "detached"
  return block_causal(bound, xs, Step(exit_level, 0, method), sink, detached)


def block_causal(bound: Bound, xs, step: Step, sink, detached: bool) -> Video:
  """Returns x0 of all blocks, each seeing its predecessors at their own level.

  sink: clean first frames, seen by the blocks behind it in place of its own.
  """
  method, sigma = step.method, step.sigmas[0]
  kept, first = (), 0
  if sink is not None:
    kept, first = bound(causal_groups(split_blocks(sink, method), 0.0, method)).kv, 0
    first = len(kept)

  def groups(place) -> tuple[Frames, ...]:
    """The blocks, each seeing others where place(m) says that their K/V are."""
    sinks = {m: Read(past=m) for m in range(first)}
    made = []
    for n, x in enumerate(xs):
      others = {m: place(m) for m in range(len(xs)) if n < first or m >= first}
      shown = {**(sinks if n >= first else {}), **others}
      made.append(Frames(x, sigma, block_positions(n, method), static_reads(method, n, shown)))
    return tuple(made)

  within = groups(lambda m: Read(group=m))
  if detached:
    # K/V of all blocks first, stopped; then each block sees the others there
    kept = jax.lax.stop_gradient((*kept, *bound(within, kept).kv))
    within = groups(lambda m: Read(past=first + m))
  return _x0(bound(within, kept), xs, sigma)
