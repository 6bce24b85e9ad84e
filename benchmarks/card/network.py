"""Forwards of the 1.3B network in bfloat16, as rollouts and losses call it."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from benchmarks import needed_flops
from benchmarks.card.programs import Program, normal
from benchmarks.card.sizes import Sizes
from hiar_jax import flow
from hiar_jax.method import Method
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.frames import Bound, Frames, Read, bind, whole_clip
from hiar_jax.rollout.blocks import write_context_and_denoise
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.types import LatentShape, Params

SIGMAS = tuple(flow.shifted_schedule((1000, 750, 500, 250), 5.0).tolist())


def network(sizes: Sizes, attention: str, who: str = "student", **changes) -> DiTConfig:
  """Returns a network of the student's or the teacher's size."""
  fields = {"dtype": "bfloat16", "remat": "full", **getattr(sizes, who), **changes}
  return DiTConfig(text_dim=sizes.text[1], attention=attention, **fields)


def latent_shape(sizes: Sizes, frames: int | None = None) -> LatentShape:
  return LatentShape(frames or sizes.frames, sizes.height, sizes.width, 16)


def weights(config: DiTConfig, dtype: str = "bfloat16") -> Params:
  """Returns random weights in `dtype`; the head's are not zeros, so velocities are not either."""
  params = config.init(jax.random.key(0))
  kernel = params["head"]["kernel"]
  params["head"]["kernel"] = kernel + 0.02 * jax.random.normal(jax.random.key(1), kernel.shape)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def text(sizes: Sizes, batch: int = 1) -> jax.Array:
  return normal(2, (batch, *sizes.text), "bfloat16")


def full_ring(bound: Bound, sizes: Sizes, method: Method) -> Ring:
  """Returns the ring that the last block of a clip meets, of random K/V."""
  ring = Ring.empty(bound.network, method, latent_shape(sizes), 1)
  kv = jax.tree.map(lambda leaf: normal(leaf.ndim, leaf.shape, leaf.dtype), ring.kv)
  return ring.replace(kv=kv, positions=jnp.arange(ring.slots, dtype=jnp.int32))


def programs(sizes: Sizes) -> list[Program]:
  """Returns a block against a past without a mask and against a ring, a pair, and a clip."""
  n, k = sizes.frames, sizes.block
  method = Method(block=k, window=n, sigmas=SIGMAS)
  shape = latent_shape(sizes)
  positions = jnp.arange(n - k, n, dtype=jnp.int32)
  latents = lambda frames: normal(3, (1, *shape.block(frames)))
  shared = functools.partial(weights, network(sizes, "xla"))

  def block(config, params, text, x):
    past = full_ring(bind(config, params, text), sizes, method).kv
    group = Frames(x, 0.9375, positions, reads=(Read(past=0),))
    return bind(config, params, text)((group,), (past,)).velocity[0]

  def ring_block(config, params, text, x):
    bound = bind(config, params, text)
    groups, past = full_ring(bound, sizes, method).read((Frames(x, 0.9375, positions),))
    return bound(groups, past).velocity[0]

  def pair(config, params, text, x):
    bound = bind(config, params, text)
    ring = full_ring(bound, sizes, method)
    before = Frames(x, 0.8333, positions)
    after = Frames(x + 1, 0.9375, positions + k)
    v, ring = write_context_and_denoise(bound, ring, before, after)
    return v, ring.kv

  def clip(config, params, text, x):
    return bind(config, params, text)(whole_clip(x, 0.9375)).velocity[0]

  net = network(sizes, "xla")

  def of(name: str, call: Callable, frames: int, keys: int, attentions) -> list[Program]:
    return [
      Program(
        f"{name}/{attention}",
        functools.partial(call, network(sizes, attention)),
        lambda: (text(sizes), latents(n if call is clip else k)),
        shared,
        tflop=needed_flops.forward(net, frames, keys, sizes.tokens, sizes.text[0]) / 1e12,
      )
      for attention in dict.fromkeys(attentions)  # once each
    ]

  return [
    *of("block, no mask", block, k, n, (sizes.kernel, "blockwise", "xla")),
    *of("block, ring", ring_block, k, n, (sizes.kernel, "blockwise")),
    *of("context and block, ring", pair, 2 * k, n, (sizes.kernel, "blockwise")),
    *of("clip", clip, n, n, (sizes.kernel, "blockwise")),
  ]
