"""The training rollout: down to an exit level without gradient, then one differentiated step.

Self-Forcing and HiAR draw the exit level at random per update. All blocks take the exit step, and
gradients pass through it alone.

Context depends on latents alone, so the differentiated step needs no sequential graph. With
`detached` or `attached` context at the output or clean level it is two parallel forwards:

    context latents [b f-k h w c]  --block-causal forward-->  K/V   (stopped where detached)
    noisy latents   [b f   h w c]  --masked forward over [K/V of the context | own block]-->  x0

At the input level (SAF) a block is its own context, and one block-causal forward does both. The
published code differentiates through the loop over blocks instead. Its values are the same; its
gradients also flow between blocks through cache entries written in the forward pass.
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
  """Returns the x0 predictions [b f h w c] of all blocks at `exit_level` (may be traced).

  Differentiable in forward's parameters through the exit step alone. frozen: the same network with
  parameters that carry no gradient; it runs everything before the exit step. cache: an empty one.
  sigmas: [s + 1]. Raises UserError for a clean sink at another level than input.
  """
  if method.level == "input":
    return _input_level_rollout(forward, frozen, noise, sigmas, method, blocks, exit_level)
  noisy, contexts, _ = jax.lax.stop_gradient(
    _sequential_rollout(frozen, noise, cache, sigmas, method, blocks, exit_level)
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
  """Returns the values of `self_rollout`, without gradient and so without its parallel forwards."""
  if method.level == "input":
    return _input_level_rollout(frozen, frozen, noise, sigmas, method, blocks, exit_level)
  _, _, x0 = _sequential_rollout(frozen, noise, cache, sigmas, method, blocks, exit_level)
  return join_blocks(x0)


def _sequential_rollout(frozen, noise, cache, sigmas, method: Method, blocks: int, exit_level):
  """Returns (blocks before the exit step, their contexts in it, their x0), each [n b k h w c]."""
  if method.clean_sink:
    raise UserError(
      "history.sink_level = 'clean' is trained at history.level = 'input' alone, not at "
      f"{method.level!r}"
    )
  if method.order == "block_first":  # context is clean: the x0 themselves
    noisy, x0 = block_first.sweep(frozen, noise, cache, sigmas, method, blocks, exit_level)
    return noisy, x0, x0
  noisy = step_first.levels(
    frozen, noise, cache, step_first.start(noise, blocks), sigmas, method, exit_level
  )
  # the exit step without gradient, for its contexts: block n's depends on those of blocks < n
  _, contexts, x0 = step_first.sweep(frozen, noise, cache, noisy, sigmas, exit_level, method)
  return noisy, contexts, x0


@typed
def teacher_forcing(
  forward: Forward, context: Video, context_sigma, noisy: Video, sigma, method: Method
) -> Video:
  """Returns x0 of `noisy` at `sigma`, block n seeing the `context` blocks < n at `context_sigma`.

  sigma, context_sigma: scalar, [b] or [b f]. Two parallel forwards, equal to one over
  [context | noisy] under visibility.teacher_forcing_mask; split, a detached context needs no
  backward pass.
  """
  positions = jnp.arange(noisy.shape[1], dtype=jnp.int32)
  mask, past = own_block_mask(positions, positions, method), None
  contexts = noisy.shape[1] - method.block  # frames: nobody sees the last block's context
  if contexts:
    earlier = positions[:contexts]
    if jnp.ndim(context_sigma) == 2:
      context_sigma = context_sigma[:, :contexts]
    _, past = forward(
      context[:, :contexts], context_sigma, earlier, mask=block_causal_mask(earlier, method)
    )
    if method.gradient == "detached":
      past = jax.lax.stop_gradient(past)
    # [f, f - k + f] over [context | noisy]. Both halves have the same positions: the left one
    # is strictly earlier blocks, and a block sees itself noisy, never its own context.
    mask = jnp.concatenate([past_mask(positions, earlier, method), mask], axis=1)
  v, _ = forward(noisy, sigma, positions, mask=mask, past=past)
  return flow.x0_from_velocity(noisy, v, sigma)


def _input_level_rollout(
  forward, frozen, noise, sigmas, method: Method, blocks: int, exit_level
) -> Video:
  """Runs the rollout with context at the input level (SAF): one block-causal forward per level."""
  sink = None
  if method.clean_sink and method.clean_sink // method.block < blocks:
    # the sink's blocks are rolled out before the rest, to the same exit level, without gradient
    plain = dataclasses.replace(method, sink_level="history")
    sink = jax.lax.stop_gradient(
      _input_level_rollout(
        frozen, frozen, noise, sigmas, plain, method.clean_sink // method.block, exit_level
      )
    )

  def predict_x0(forward, xs, j, detached=False):  # xs [n b k h w c] -> [b f h w c]
    return block_causal(forward, join_blocks(xs), sigmas[j], method, sink, detached)

  def advance(j, xs):
    x0 = split_blocks(predict_x0(frozen, xs, j), method)
    eps = jax.lax.map(lambda n: noise(j + 1, n), jnp.arange(blocks))
    x_fresh = flow.add_noise(x0, eps, sigmas[j + 1])
    if method.renoise == "fresh":
      return x_fresh
    return flow.euler(xs, flow.velocity_from_x0(xs, x0, sigmas[j]), sigmas[j], sigmas[j + 1])

  xs = jax.lax.fori_loop(0, exit_level, advance, step_first.start(noise, blocks))
  detached = method.gradient == "detached" and forward is not frozen
  return predict_x0(forward, jax.lax.stop_gradient(xs), exit_level, detached)


@typed
def block_causal(
  forward: Forward,
  x: Video,
  sigma,
  method: Method,
  sink: Float[Array, "b p h w c"] | None = None,
  detached: bool = False,
) -> Video:
  """Returns x0 of all blocks, each seeing its predecessors at their own level.

  sink: clean first frames, seen in place of the first p frames of x. detached: no gradient passes
  through what a block sees of other blocks; this takes a second forward.
  """
  positions = jnp.arange(x.shape[1], dtype=jnp.int32)
  mask, past = block_causal_mask(positions, method), None
  if sink is not None:
    first = positions[: sink.shape[1]]
    _, past = forward(sink, 0.0, first, mask=block_causal_mask(first, method))
    # [f, p + f] over [clean sink | x]: blocks after the sink see it clean and not noisy. The
    # sink's own blocks see each other noisy, as when they were generated.
    after = positions[:, None] >= first.size
    noisy_sink = after & (positions[None, :] < first.size)
    mask = jnp.concatenate(
      [past_mask(positions, first, method) & after, mask & ~noisy_sink], axis=1
    )
  if detached:
    # First forward: K/V of all blocks, which become the past, stopped. Second: each block sees
    # the others there and only itself with gradient.
    _, kv = forward(x, sigma, positions, mask=mask, past=past)
    past = (
      kv if past is None else jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), past, kv)
    )
    past, own = jax.lax.stop_gradient(past), own_block_mask(positions, positions, method)
    # [f, p + f + f] over [clean sink | x stopped | x]: a block's own columns move from the
    # stopped copy (padding skips the sink's p columns) to the last f
    in_past = jnp.pad(own, ((0, 0), (mask.shape[1] - own.shape[1], 0)))
    mask = jnp.concatenate([mask & ~in_past, own], axis=1)
  v, _ = forward(x, sigma, positions, mask=mask, past=past)
  return flow.x0_from_velocity(x, v, sigma)
