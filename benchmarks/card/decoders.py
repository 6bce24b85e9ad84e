"""The decoders of Wan2.1's latents: the VAE in both precisions, and TAEHV; a block in a stream."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.card.network import latent_shape
from benchmarks.card.programs import Program, normal
from benchmarks.card.sizes import Sizes
from hiar_jax.models import taehv, vae


def programs(sizes: Sizes) -> list[Program]:
  """Returns the decoding of one more latent frame, and of one more block."""
  kinds = {
    "TAEHV, bfloat16": (taehv, taehv.TinyVAEConfig(**sizes.taehv, dtype=jnp.bfloat16)),
    "VAE, bfloat16": (vae, vae.VAEConfig(**sizes.vae, dtype=jnp.bfloat16)),
    "VAE, float32": (vae, vae.VAEConfig(**sizes.vae)),
  }
  return [
    _program(f"{name}/{frames} latent frames", module, config, sizes, frames)
    for name, (module, config) in kinds.items()
    for frames in (1, sizes.block)
  ]


def _program(name: str, module, config, sizes: Sizes, frames: int) -> Program:
  latents = lambda count: normal(1, (1, *latent_shape(sizes).block(count)))

  def decode(params, latents, cache):
    return module.decode_chunk(params, latents, cache, config)

  def fill():
    shapes = jax.eval_shape(
      lambda: decode(module.init(config, jax.random.key(0)), latents(1), None)[1]
    )
    cache = jax.tree.map(lambda leaf: normal(2, leaf.shape, leaf.dtype), shapes)
    return latents(frames), cache

  shared = functools.partial(module.init, config, jax.random.key(0))
  return Program(name, decode, fill, shared, frames=4 * frames)
