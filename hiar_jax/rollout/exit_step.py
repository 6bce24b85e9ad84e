"""The training rollout: down to a random exit level without gradient, then that level's step for
all blocks at once with it.

What a block's history shows depends on latents alone, so the differentiated step needs no
sequential graph: the history's K/V come from one block-causal forward over the shown latents, and
all noisy blocks read them in one masked forward. `detached` history stops the gradient at those K/V
(HiAR, Self-Forcing); `attached` lets it through (SAF; SGF).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.rollout import block_first, step_first
from hiar_jax.rollout.blocks import Forward, Noise, join_blocks, split_blocks
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.rollout.past.visibility import block_causal_mask, own_block_mask, past_mask
from hiar_jax.types import Array, Video, typed


def self_rollout(
  forward: Forward,
  frozen: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  exit_level,
) -> Video:
  """x0 of all blocks at `exit_level` (may be traced), differentiable in forward's parameters
  through that step alone.

  frozen: the same network with parameters that carry no gradient; it does everything before the
  exit step.
  """
  if method.level == "input":
    return _aligned(forward, frozen, noise, sigmas, method, blocks, exit_level)
  noisy, contexts, _ = jax.lax.stop_gradient(
    _sequential(frozen, noise, cache, sigmas, method, blocks, exit_level)
  )
  sigma, sigma_next = sigmas[exit_level], sigmas[exit_level + 1]
  context_sigma = method.context_sigma(sigma, sigma_next)
  return teacher_forcing(
    forward, join_blocks(contexts), context_sigma, join_blocks(noisy), sigma, method
  )


def self_rollout_without_gradient(
  frozen: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  exit_level,
) -> Video:
  """What exit_rollout returns, without gradient and so without its second pass."""
  if method.level == "input":
    return _aligned(frozen, frozen, noise, sigmas, method, blocks, exit_level)
  return join_blocks(_sequential(frozen, noise, cache, sigmas, method, blocks, exit_level)[2])


def _sequential(frozen, noise, cache, sigmas, method: Method, blocks: int, exit_level):
  """Each [n b k h w c]: the blocks before the exit step, what their successors see in it, their
  x0.
  """
  if method.clean_sink:
    raise UserError(
      "history.sink_level = 'clean' is trained at history.level = 'input' alone, not at "
      f"{method.level!r}"
    )
  if method.order == "block_first":
    noisy, x0 = block_first.sweep(frozen, noise, cache, sigmas, method, blocks, exit_level)
    return noisy, x0, x0
  noisy = step_first.levels(
    frozen, noise, cache, step_first.start(noise, blocks), sigmas, method, exit_level
  )
  _, contexts, x0 = step_first.sweep(frozen, noise, cache, noisy, sigmas, exit_level, method)
  return noisy, contexts, x0


@typed
def teacher_forcing(
  forward: Forward, context: Video, context_sigma, noisy: Video, sigma, method: Method
) -> Video:
  """x0 of `noisy` blocks at `sigma`, block n seeing the `context` blocks < n at `context_sigma`:
  two parallel forwards.

  sigma, context_sigma: scalar, [b] or [b f]. Equal to one forward over [context | noisy] under
  visibility.teacher_forcing_mask, but the context's half needs no backward pass where it is
  detached.
  """
  positions = jnp.arange(noisy.shape[1], dtype=jnp.int32)
  mask, past = own_block_mask(positions, positions, method), None
  contexts = noisy.shape[1] - method.block  # nobody sees the last block
  if contexts:
    earlier = positions[:contexts]
    if jnp.ndim(context_sigma) == 2:
      context_sigma = context_sigma[:, :contexts]
    _, past = forward(
      context[:, :contexts], context_sigma, earlier, mask=block_causal_mask(earlier, method)
    )
    if method.gradient == "detached":
      past = jax.lax.stop_gradient(past)
    mask = jnp.concatenate([past_mask(positions, earlier, method), mask], axis=1)
  v, _ = forward(noisy, sigma, positions, mask=mask, past=past)
  return flow.x0_from_velocity(noisy, v, sigma)


def _aligned(forward, frozen, noise, sigmas, method: Method, blocks: int, exit_level) -> Video:
  """History at the input level (SAF): blocks read each other as they are, so a level is one
  block-causal forward.
  """
  sink = None
  if method.clean_sink and method.clean_sink // method.block < blocks:
    plain = dataclasses.replace(method, sink_level="history")
    sink = jax.lax.stop_gradient(
      _aligned(frozen, frozen, noise, sigmas, plain, method.clean_sink // method.block, exit_level)
    )

  def level(forward, xs, j, detached=False):
    return block_causal(forward, join_blocks(xs), sigmas[j], method, sink, detached)

  def advance(j, xs):
    x0 = split_blocks(level(frozen, xs, j), method)
    eps = jax.lax.map(lambda n: noise(j + 1, n), jnp.arange(blocks))
    x_fresh = flow.add_noise(x0, eps, sigmas[j + 1])
    if method.renoise == "fresh":
      return x_fresh
    return flow.euler(xs, flow.velocity_from_x0(xs, x0, sigmas[j]), sigmas[j], sigmas[j + 1])

  xs = jax.lax.fori_loop(0, exit_level, advance, step_first.start(noise, blocks))
  detached = method.gradient == "detached" and forward is not frozen
  return level(forward, jax.lax.stop_gradient(xs), exit_level, detached)


@typed
def block_causal(
  forward: Forward,
  x: Video,
  sigma,
  method: Method,
  sink: Float[Array, "b p h w c"] | None = None,
  detached: bool = False,
) -> Video:
  """x0 of all blocks, each seeing its predecessors at their own level; a clean `sink` is seen in
  place of the first frames.

  detached: no gradient passes through what a block sees of others, which takes a second forward.
  """
  positions = jnp.arange(x.shape[1], dtype=jnp.int32)
  mask, past = block_causal_mask(positions, method), None
  if sink is not None:
    first = positions[: sink.shape[1]]
    _, past = forward(sink, 0.0, first, mask=block_causal_mask(first, method))
    # the sink's own blocks see each other noisy, as when they were generated
    after = positions[:, None] >= first.size
    own_sink = after & (positions[None, :] < first.size)
    mask = jnp.concatenate([past_mask(positions, first, method) & after, mask & ~own_sink], axis=1)
  if detached:
    _, kv = forward(x, sigma, positions, mask=mask, past=past)
    past = (
      kv if past is None else jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), past, kv)
    )
    past, own = jax.lax.stop_gradient(past), own_block_mask(positions, positions, method)
    in_past = jnp.pad(own, ((0, 0), (mask.shape[1] - own.shape[1], 0)))
    mask = jnp.concatenate([mask & ~in_past, own], axis=1)
  v, _ = forward(x, sigma, positions, mask=mask, past=past)
  return flow.x0_from_velocity(x, v, sigma)
