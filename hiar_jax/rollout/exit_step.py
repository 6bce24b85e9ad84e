"""The training rollout: down to an exit level without gradient, then one differentiated step.

Self-Forcing and HiAR draw the exit level at random per update. All blocks take the exit step, and
gradients pass through it alone.

Context depends on latents alone, so the differentiated step needs no sequential graph: it is one
forward of all blocks, with the K/V of the contexts as its past.

    noisy latents   [b f   h w c]  --a group a block, which reads [K/V of the context]-->  x0

`detached` K/V are those that the rollout has made on its way. `attached` ones are made once more,
with gradient, by a forward that is parallel too:

    context latents [b f-k h w c]  --block-causal forward-->  K/V

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
from hiar_jax.rollout.past.clip import ClipPast
from hiar_jax.rollout.past.clip_groups import block_groups, causal_groups
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
  noisy, contexts, kept = jax.lax.stop_gradient(
    _until_exit(frozen, noise, method, shape, exit_level)
  )
  step = Step(method, exit_level, 0)
  noisy = join_blocks(noisy)
  if method.gradient == "attached":
    return teacher_forcing(bound, contexts, step.context_sigma, noisy, step.sigma, method)
  return _with_contexts(bound, kept, (contexts, step.context_sigma), noisy, step.sigma, method)


def self_rollout_without_gradient(
  bound: Bound, noise: Noise, method: Method, shape: LatentShape, exit_level
) -> Video:
  """Returns the values of `self_rollout`, without gradient and so without its parallel forwards."""
  blocks = shape.frames // method.block
  if method.context.free:
    return _free_rollout(bound, bound, noise, method, blocks, exit_level)
  past = _clip_past(method)
  if method.order == "block_first":
    return join_blocks(block_first.sweep(bound, noise, past, blocks, exit_level)[3])
  noisy = _descend(bound, noise, past, blocks, exit_level)
  return join_blocks(step_first.sweep(bound, noise, past, noisy, exit_level)[3])


def _until_exit(frozen: Bound, noise, method: Method, shape: LatentShape, exit_level):
  """Returns (all blocks before the exit step [n b k h w c], the contexts that they see in it
  [b f-k h w c], and the K/V of these by block).
  """
  blocks, past = shape.frames // method.block, _clip_past(method)
  if method.order == "block_first":
    # of the last block nothing but its input is read, so the compiler drops the rest
    past, noisy, contexts, _ = block_first.sweep(frozen, noise, past, blocks, exit_level)
    return noisy, join_blocks(contexts[:-1]), past.kv[:-1]
  noisy = _descend(frozen, noise, past, blocks, exit_level)
  if blocks == 1:
    return noisy, noisy[0][:, :0], ()
  # block n's context depends on those of blocks < n; the last block's is shown to nobody
  contexts, past = step_first.show(frozen, noise, past, noisy[:-1], exit_level)
  return noisy, join_blocks(contexts), past.kv


def _clip_past(method: Method) -> ClipPast:
  if method.clean_sink:
    raise UserError(
      "history.sink_level = 'clean' is trained at history.level = 'input' alone, not at "
      f"{method.level!r}"
    )
  return ClipPast(method)


def _descend(bound: Bound, noise: Noise, past: ClipPast, blocks: int, exit_level) -> jax.Array:
  """Takes all blocks from noise to `exit_level`, level by level: [n b k h w c]."""

  def next_level(level, xs):
    return step_first.sweep(bound, noise, past, xs, level)[1]

  # a loop of unknown length has no backward pass, and needs none
  return jax.lax.fori_loop(0, exit_level, next_level, step_first.initial_noise(noise, blocks))


@typed
def teacher_forcing(
  bound: Bound,
  context: Float[Array, "b p h w c"],
  context_sigma,
  noisy: Video,
  sigma,
  method: MethodConfig,
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
  return _with_contexts(bound, kept, (context, context_sigma), noisy, sigma, method)


def _with_contexts(
  bound: Bound, kept: tuple[KV, ...], shown: tuple, noisy: Video, sigma, method: MethodConfig
) -> Video:
  """Returns x0 of `noisy`, all blocks in one forward. kept: K/V of the blocks' contexts; shown: the
  contexts and their level.
  """
  # a block sees itself noisy, never its own context
  places = {m: Read(past=m) for m in range(len(kept))}
  groups = block_groups(noisy, sigma, method, [places] * (len(kept) + 1), shown)
  v = jnp.concatenate(bound(groups, kept).velocity, axis=1)
  return flow.x0_from_velocity(noisy, v, sigma)


def _free_rollout(
  bound: Bound, frozen: Bound, noise: Noise, method: Method, blocks: int, exit_level
) -> Video:
  """Runs the rollout whose contexts are free (SAF): one block-causal forward per level."""
  sink, levels = (), jnp.asarray(method.sigma_table)
  if method.clean_sink and method.clean_sink // method.block < blocks:
    # the sink's blocks are rolled out before the rest, to the same exit level, without gradient
    plain = dataclasses.replace(method, sink_level="history")
    clean = jax.lax.stop_gradient(
      _free_rollout(frozen, frozen, noise, plain, method.clean_sink // method.block, exit_level)
    )
    sink = clean_kv(frozen, clean, method)  # of all levels

  def advance(j, xs):  # [n b k h w c]
    x0 = block_causal(frozen, join_blocks(xs), levels[j], method, sink)
    x0 = split_blocks(x0, method)
    eps = jax.lax.map(lambda n: noise(j + 1, n), jnp.arange(blocks))
    x_fresh = flow.add_noise(x0, eps, levels[j + 1])
    if method.renoise == "fresh":
      return x_fresh
    return flow.euler(xs, flow.velocity_from_x0(xs, x0, levels[j]), levels[j], levels[j + 1])

  xs = jax.lax.fori_loop(0, exit_level, advance, step_first.initial_noise(noise, blocks))
  x = jax.lax.stop_gradient(join_blocks(xs))
  detached = method.gradient == "detached" and bound is not frozen
  if sink and bound is not frozen:
    sink = clean_kv(bound, clean, method)
  return block_causal(bound, x, levels[exit_level], method, sink, detached)


def clean_kv(bound: Bound, sink: Video, method: MethodConfig) -> tuple[KV, ...]:
  """Returns the K/V of a clean sink by block."""
  return bound(causal_groups(sink, 0.0, method)).kv


@typed
def block_causal(
  bound: Bound,
  x: Video,
  sigma,
  method: MethodConfig,
  sink: tuple = (),
  detached: bool = False,
) -> Video:
  """Returns x0 of all blocks, each seeing its predecessors at their own level.

  sink: K/V of clean first blocks, seen by the blocks after them in place of those of x; among
  themselves these see each other noisy, as when they were generated. detached: no gradient passes
  through what a block sees of other blocks; this takes a second forward.
  """
  blocks, kept, first = x.shape[1] // method.block, sink, len(sink)

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
