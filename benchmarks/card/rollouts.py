"""Whole videos of the 1.3B student, as each method generates them, and a stream; without a VAE."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.card.network import SIGMAS, latent_shape, network, text, weights
from benchmarks.card.programs import Program
from benchmarks.card.sizes import Sizes
from hiar_jax.method import Method
from hiar_jax.models.frames import bind
from hiar_jax.rollout import tick
from hiar_jax.rollout.noise import block_noise
from hiar_jax.rollout.sample import make_sampler

ROWS = {  # hiar_jax.method's table
  "HiAR": dict(window=21),
  "Self-Forcing": dict(order="block_first", level="clean", window=21),
  "SAF": dict(level="input", gradient="attached", window=12, sink=3, sink_level="clean"),
}
KEY = 5  # of the noise


def programs(sizes: Sizes) -> list[Program]:
  """Returns the rollouts of every method, a stream's ticks, and HiAR with attention in chunks."""
  shape = latent_shape(sizes)
  shared = functools.partial(weights, network(sizes, "xla"))
  pixel_frames = 4 * (sizes.frames - 1) + 1
  methods = {
    name: Method(block=sizes.block, sigmas=SIGMAS, **row | {"window": min(row["window"], 21)})
    for name, row in ROWS.items()
  }

  def video(config, method, params, text):
    sampler = make_sampler(config, method, key=jax.random.key(KEY), shape=shape)
    return sampler(params, text, jnp.zeros(1, jnp.int32))

  def ticks(config, method, params, text, state):
    noise = block_noise(state.key, state.seed, shape.block(method.block))
    return tick.tick(bind(config, params, text), noise, state, text, jnp.zeros((), bool))

  def state(method):
    seed = jnp.zeros(1, jnp.int32)
    config = network(sizes, "xla")
    bound = bind(config, None, text(sizes))
    # far into a video: every slot of the ring is taken
    fresh = tick.empty(bound, method, shape, jax.random.key(KEY), seed)
    return fresh.replace(block=jnp.asarray(100, jnp.int32))

  made = [
    Program(
      f"video of {name}/{attention}",
      functools.partial(video, network(sizes, attention), methods[name]),
      lambda: (text(sizes),),
      shared,
      frames=pixel_frames,
      repeats=2,
    )
    for name, attention in [*((name, sizes.kernel) for name in ROWS), ("HiAR", "blockwise")]
  ]
  ticked = [
    Program(
      f"tick of HiAR, four levels/{attention}",
      functools.partial(ticks, network(sizes, attention), methods["HiAR"]),
      lambda: (text(sizes), state(methods["HiAR"])),
      shared,
      frames=4 * sizes.block,
    )
    for attention in ("blockwise", sizes.kernel)
  ]
  return made + ticked
