"""The training rollout: down to an exit level without gradient, then one differentiated step.

Self-Forcing and HiAR draw the exit level at random per update. All blocks take the exit step, and
gradients pass through it alone.

Context depends on latents alone, so the differentiated step needs no sequential graph. With
`detached` or `attached` context at the output or clean level it is two parallel forwards:

    context latents [b f-k h w c]  --block-causal forward-->  K/V   (stopped where detached)
    noisy latents   [b f   h w c]  --a group a block, which reads [K/V of the context]-->  x0

Where a context is free (SAF) a block is its own context, and one block-causal forward does both.
The published code differentiates through the loop over blocks instead. Its values are the same; its
gradients also flow between blocks through cache entries written in the forward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.method import Method, MethodConfig
from hiar_jax.models.frames import KV, Bound, Frames, Read
from hiar_jax.rollout import block_first, step_first
from hiar_jax.rollout.blocks import (
  Noise,
  Step,
  join_blocks,
  split_blocks,
)
from hiar_jax.rollout.past.clip_groups import block_groups, causal_groups
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.types import Array, LatentShape, Video, typed


def self_rollout(
  bound: Bound, noise: Noise, method: Method, shape: LatentShape, exit_level
) -> Video:
  """Returns the x0 predictions [b f h w c] of all blocks at `exit_level` (may be traced).

  Differentiable in bound's parameters through the exit step alone. Raises UserError for a clean
  sink where contexts are not free.
  """
  frozen = jax.lax.stop_gradient(bound)
  if method.context.free:
    return _free_rollout(bound, frozen, noise, method, shape.frames // method.block, exit_level)
  noisy, contexts, _ = jax.lax.stop_gradient(
    _sequential_rollout(frozen, noise, method, shape, exit_level)
  )
  step = Step(method, exit_level, 0)
  contexts, noisy = join_blocks(contexts), join_blocks(noisy)
  return teacher_forcing(bound, contexts, step.context_sigma, noisy, step.sigma, method)


def self_rollout_without_gradient(
  bound: Bound, noise: Noise, method: Method, shape: LatentShape, exit_level
) -> Video:
  """Returns the values of `self_rollout`, without gradient and so without its parallel forwards."""
  if method.context.free:
    return _free_rollout(bound, bound, noise, method, shape.frames // method.block, exit_level)
  return join_blocks(_sequential_rollout(bound, noise, method, shape, exit_level)[2])


def _sequential_rollout(frozen: Bound, noise, method: Method, shape: LatentShape, exit_level):
  """Returns (blocks before the exit step, their contexts in it, their x0), each [n b k h w c]."""
  if method.clean_sink:
    raise UserError(
      "history.sink_level = 'clean' is trained at history.level = 'input' alone, not at "
      f"{method.level!r}"
    )
  blocks = shape.frames // method.block
  past = kind(method).empty(frozen.network, method, shape, frozen.batch)
  if method.order == "block_first":
    return block_first.sweep(frozen, noise, past, blocks, exit_level)

  def next_level(level, xs):
    return step_first.sweep(frozen, noise, past, xs, level)[0]

  # a loop of unknown length has no backward pass, and needs none
  noisy = jax.lax.fori_loop(0, exit_level, next_level, step_first.initial_noise(noise, blocks))
  # the exit step without gradient, for its contexts: block n's depends on those of blocks < n
  _, contexts, x0 = step_first.sweep(frozen, noise, past, noisy, exit_level)
  return noisy, contexts, x0


@typed
def teacher_forcing(
  bound: Bound, context: Video, context_sigma, noisy: Video, sigma, method: MethodConfig
) -> Video:
  """Returns x0 of `noisy` at `sigma`, block n seeing the `context` blocks < n at `context_sigma`.

  sigma, context_sigma: scalar, [b] or [b f]. Two parallel forwards, equal to one over
  [context | noisy]; split, a detached context needs no backward pass.
  """
  kept = ()
  contexts = noisy.shape[1] - method.block  # frames: nobody sees the last block's context
  if contexts:
    kept = bound(causal_groups(context[:, :contexts], context_sigma, method)).kv
    if method.gradient == "detached":
      kept = jax.lax.stop_gradient(kept)
  # a block sees itself noisy, never its own context
  shown = {m: Read(past=m) for m in range(len(kept))}
  groups = block_groups(noisy, sigma, method, [shown] * (len(kept) + 1), (context, context_sigma))
  v = jnp.concatenate(bound(groups, kept).velocity, axis=1)
  return flow.x0_from_velocity(noisy, v, sigma)


def _free_rollout(
  bound: Bound, frozen: Bound, noise: Noise, method: Method, blocks: int, exit_level
) -> Video:
  """Runs the rollout whose contexts are free (SAF): one block-causal forward per level."""
  sink = None
  if method.clean_sink and method.clean_sink // method.block < blocks:
    # the sink's blocks are rolled out before the rest, to the same exit level, without gradient
    plain = dataclasses.replace(method, sink_level="history")
    sink = jax.lax.stop_gradient(
      _free_rollout(frozen, frozen, noise, plain, method.clean_sink // method.block, exit_level)
    )
  sigmas = jnp.asarray(method.sigma_table)

  def predict_x0(bound, xs, j, detached=False):  # xs [n b k h w c] -> [b f h w c]
    return block_causal(bound, join_blocks(xs), sigmas[j], method, sink, detached)

  def advance(j, xs):
    x0 = split_blocks(predict_x0(frozen, xs, j), method)
    eps = jax.lax.map(lambda n: noise(j + 1, n), jnp.arange(blocks))
    x_fresh = flow.add_noise(x0, eps, sigmas[j + 1])
    if method.renoise == "fresh":
      return x_fresh
    return flow.euler(xs, flow.velocity_from_x0(xs, x0, sigmas[j]), sigmas[j], sigmas[j + 1])

  xs = jax.lax.fori_loop(0, exit_level, advance, step_first.initial_noise(noise, blocks))
  detached = method.gradient == "detached" and bound is not frozen
  return predict_x0(bound, jax.lax.stop_gradient(xs), exit_level, detached)


@typed
def block_causal(
  bound: Bound,
  x: Video,
  sigma,
  method: MethodConfig,
  sink: Float[Array, "b p h w c"] | None = None,
  detached: bool = False,
) -> Video:
  """Returns x0 of all blocks, each seeing its predecessors at their own level.

  sink: clean first frames, seen by the blocks after them in place of the first p frames of x; among
  themselves those see each other noisy, as when they were generated. detached: no gradient passes
  through what a block sees of other blocks; this takes a second forward.
  """
  blocks = x.shape[1] // method.block
  kept: tuple[KV, ...] = ()
  if sink is not None:
    kept = bound(causal_groups(sink, 0.0, method)).kv
  first = len(kept)  # blocks of the sink

  def groups(place) -> tuple[Frames, ...]:
    """The blocks as groups, the K/V of block m being where place(m) says."""
    clean = {m: Read(past=m) for m in range(first)}
    noisy = {m: place(m) for m in range(blocks)}
    return block_groups(
      x, sigma, method, [{**noisy, **clean} if n >= first else noisy for n in range(blocks)]
    )

  within = groups(lambda m: Read(group=m))
  if detached:
    # First forward: K/V of all blocks, which become the past, stopped. Second: each block sees the
    # others there and only itself with gradient.
    kept = jax.lax.stop_gradient((*kept, *bound(within, kept).kv))
    within = groups(lambda m: Read(past=first + m))
  v = jnp.concatenate(bound(within, kept).velocity, axis=1)
  return flow.x0_from_velocity(x, v, sigma)
