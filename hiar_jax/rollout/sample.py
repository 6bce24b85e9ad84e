"""Generation of a whole video: method.Method decides which loop runs."""

from collections.abc import Callable
import dataclasses

import jax

from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.models.dit import DiTConfig
from hiar_jax.rollout import block_first, image_to_video, step_first
from hiar_jax.rollout.blocks import Forward, Noise
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.past import ring as caches
from hiar_jax.rollout.past.ring import Cache
from hiar_jax.types import Key, LatentShape, Text, Video


def make_sampler(
  config: DiTConfig,
  embed: Callable[[jax.Array], Text],
  sigmas: jax.Array,
  method: Method,
  *,
  key: Key,
  latent: LatentShape,
  frames: int,
) -> Callable[..., Video]:
  """Returns generate(params, tokens, seeds [b], given=None) -> latents [b given + frames h w c].

  Traced; the caller jits. A video depends on its own text and seed, not on the rest of the batch.

  embed: tokens [b ...] -> text [b l d]. sigmas: the student's levels [s + 1]. latent: height, width
  and channels of the latents. frames: new latent frames, whole blocks.
  given: clean first frames: whole blocks, or one frame (an image).
  """

  def generate(params, tokens, seeds, given=None):
    cache = caches.empty(
      config,
      method,
      batch=tokens.shape[0],
      frames=frames + (0 if given is None else given.shape[1]),
      height=latent.height,
      width=latent.width,
    )
    return rollout(
      dit.bind(config, params, embed(tokens)),
      block_noise(key, seeds, latent.block(method.block)),
      cache,
      sigmas,
      method,
      frames // method.block,
      given=given,
    )

  return generate


def rollout(
  forward: Forward,
  noise: Noise,
  cache: Cache,
  sigmas: jax.Array,
  method: Method,
  blocks: int,
  *,
  given: Video | None = None,
  fused: bool = True,
) -> Video:
  """Generates `blocks` blocks after the `given` clean frames: [b given + blocks k h w c].

  given: whole blocks, or one frame (an image). A clean sink (SAF) is generated first, by the same
  method without one, and is then context at sigma 0 for every later block.
  """
  # not whole blocks: an image, which stands alone
  if given is not None and given.shape[1] % method.block:
    return image_to_video.rollout(forward, noise, cache, sigmas, method, blocks, given)
  if method.order == "block_first":
    return block_first.rollout(forward, noise, cache, sigmas, method, blocks, given=given)
  sink_blocks = method.clean_sink // method.block
  if sink_blocks and given is None:
    # from here on the finished sink is like given frames; blocks count on behind it
    plain = dataclasses.replace(method, sink_level="history")
    head = min(sink_blocks, blocks)
    given = step_first.rollout(forward, noise, cache, sigmas, plain, head, fused=fused)
    blocks -= head
    if not blocks:
      return given
  return step_first.rollout(forward, noise, cache, sigmas, method, blocks, given=given, fused=fused)
