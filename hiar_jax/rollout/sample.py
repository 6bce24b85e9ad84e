"""One entry for every method: the row of history.History decides which loop runs."""

import dataclasses

import jax

from hiar_jax.method import History
from hiar_jax.rollout import block_first, step_first
from hiar_jax.rollout.blocks import Forward, Noise
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.types import Video


def rollout(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  history: History,
  blocks: int,
  *,
  given: Video | None = None,
  fused: bool = True,
) -> Video:
  """`blocks` new blocks after the `given` clean frames, in the order, levels, window and sink of
  `history`: [b f h w c].

  A clean sink (SAF) is generated first, by the same method without one, and is then what every
  later block sees at sigma 0.
  """
  if history.order == "block_first":
    return block_first.rollout(forward, noise, cache, sigmas, history, blocks, given=given)
  sink_blocks = history.clean_sink // history.block
  if sink_blocks and given is None:
    plain = dataclasses.replace(history, sink_level="history")
    head = min(sink_blocks, blocks)
    given = step_first.rollout(forward, noise, cache, sigmas, plain, head, fused=fused)
    blocks -= head
    if not blocks:
      return given
  return step_first.rollout(
    forward, noise, cache, sigmas, history, blocks, given=given, fused=fused
  )
