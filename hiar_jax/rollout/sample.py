"""Generation of a whole video: method.Method decides which loop runs."""

from collections.abc import Callable
import dataclasses

import jax.numpy as jnp

from hiar_jax.method import Method
from hiar_jax.models.frames import Bound, Network, bind
from hiar_jax.rollout import block_first, step_first
from hiar_jax.rollout.blocks import Noise, blocks_of, join_blocks, prefill
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.past.kinds import kind
from hiar_jax.types import Key, LatentShape, Video

ORDERS = {"step_first": step_first.generate, "block_first": block_first.generate}


def make_sampler(
  network: Network,
  method: Method,
  *,
  key: Key,
  shape: LatentShape,
) -> Callable[..., Video]:
  """Returns generate(params, text, seeds [b], given=None) -> latents [b given + frames h w c].

  Traced; the caller jits. A video depends on its own text and seed, not on the rest of the batch.

  text: [b l d]. shape: of the new latents, whole blocks. given: see
  rollout.
  """

  def generate(params, text, seeds, given=None):
    bound = bind(network, params, text)
    noise = block_noise(key, seeds, shape.block(method.block))
    return rollout(bound, noise, method, shape, given)

  return generate


def rollout(
  bound: Bound,
  noise: Noise,
  method: Method,
  shape: LatentShape,
  given: Video | None = None,
) -> Video:
  """Generates shape.frames latent frames after the `given` clean ones: [b given + frames h w c].

  noise(level, block): block counts from the start of the video, given ones
  included. given: whole blocks, or one frame (an image). A clean sink (SAF) is generated first, by
  the same method without one, and is then context at sigma 0 for every later block.
  """
  if method.clean_sink and given is None:
    # from here on the finished sink is like given frames; blocks count on behind it
    plain = dataclasses.replace(method, sink_level="history")
    head = dataclasses.replace(shape, frames=min(method.clean_sink, shape.frames))
    given = rollout(bound, noise, plain, head)
    shape = dataclasses.replace(shape, frames=shape.frames - head.frames)
    if not shape.frames:
      return given
  given_frames = 0 if given is None else given.shape[1]
  video = dataclasses.replace(shape, frames=given_frames + shape.frames)
  past = kind(method).empty(bound.network, method, video, bound.batch)
  if given is not None:
    past = prefill(bound, past, given)
  blocks, first = shape.frames // method.block, blocks_of(given, method)
  new = join_blocks(ORDERS[method.order](bound, noise, past, blocks, first))
  return new if given is None else jnp.concatenate([given, new], axis=1)
