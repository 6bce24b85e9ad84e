"""The primitives of every rollout: denoise a block, write its context into the past, or both.

Context is what the blocks after a block see of it (hiar_jax.context): the K/V of a latent of its at
a noise level that the method sets. They take a forward over that latent, since its level is not the
one at which the block was denoised, except where the context level is free.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.models.frames import KV, Bound, Frames, Read
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import block_positions
from hiar_jax.types import Block, Positions, Video

# (level, block) -> eps [b k h w c] with which the block arrives at the level; at level 0 it starts.
# Levels behind the method's own are the draws of contexts that add noise of theirs.
Noise = Callable[[jax.Array | int, jax.Array | int], Block]


@dataclasses.dataclass(frozen=True)
class Step:
  """The denoising step of block n from `level` to the next; both may be traced."""

  method: Method
  level: jax.Array | int
  n: jax.Array | int

  @property
  def sigma(self) -> jax.Array:
    return jnp.asarray(self.method.sigma_table)[self.level]

  @property
  def sigma_next(self) -> jax.Array:
    return jnp.asarray(self.method.sigma_table)[self.level + 1]

  @property
  def context_sigma(self) -> jax.Array:
    """The noise level of the block as context."""
    return self.method.context.sigma(self.sigma, self.sigma_next)

  @property
  def positions(self) -> Positions:
    return block_positions(self.n, self.method)

  def finish(self, x: Block, v: Block, noise: Noise) -> tuple[Block, Block, Block]:
    """Returns (x at the next level, the block's context, its x0) from the velocity v at x.

    `fresh` adds new noise to x0; `euler` follows the velocity (HiAR, Eq. 3) and draws none.
    """
    x0 = flow.x0_from_velocity(x, v, self.sigma)
    if self.method.renoise == "euler":
      x_next = flow.euler(x, v, self.sigma, self.sigma_next)
    else:
      x_next = flow.add_noise(x0, noise(self.level + 1, self.n), self.sigma_next)

    def noised(x0):
      eps = noise(self.method.levels + 1 + self.level, self.n)
      return flow.add_noise(x0, eps, self.context_sigma)

    return x_next, self.method.context.latent(x, x_next, x0, noised), x0


def split_blocks(video: Video, method: Method) -> jax.Array:
  """[b f h w c] -> [n b k h w c], with blocks in front for lax.scan."""
  b, f, *rest = video.shape
  return jnp.moveaxis(video.reshape(b, f // method.block, method.block, *rest), 1, 0)


def join_blocks(blocks: jax.Array) -> Video:
  """[n b k h w c] -> [b f h w c]."""
  n, b, k, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * k, *rest)


def denoise(bound: Bound, past: Ring, x: Frames) -> tuple[Block, KV]:
  """Runs one group against the past: (velocity, the group's own K/V)."""
  groups, kept = past.read((x,))
  out = bound(groups, kept)
  return out.velocity[0], out.kv[0]


def write_context(bound: Bound, past: Ring, context: Frames) -> Ring:
  """Writes the K/V of a block's context into the past."""
  _, kv = denoise(bound, past, context)
  return past.write(kv, context)


def write_context_and_denoise(
  bound: Bound, past: Ring, context: Frames, x: Frames
) -> tuple[Block, Ring]:
  """Runs [context of block n | noisy block n + 1] in one forward (HiAR, section 3.3).

  Returns (velocity of block n + 1, past with block n written). The noisy block sees the context as
  if it were in the past already; nobody sees the noisy block. A context that does not exist
  (Frames.exists) is neither seen nor kept.
  """
  seen = past.visible(past.method, x.positions[-1], context.positions)
  groups, kept = past.read((context, x.replace(reads=(Read(group=0, seen=seen),))))
  out = bound(groups, kept)
  keep = True if context.exists is None else context.exists
  return out.velocity[1], past.write(out.kv[0], context, keep)


def prefill(bound: Bound, past: Ring, given: Video) -> Ring:
  """Writes `given` clean frames into the past: the start of a continuation, or a clean sink.

  given: whole blocks; or one frame, an image, which stands alone before whole blocks
  (Self-Forcing's
  published code: `independent_first_frame`). Networks see positions through rotary embeddings,
  hence only differences of them, so an image takes the last position of block 0, whose other frames
  never exist, and every rule about blocks, windows and sinks holds unchanged.
  """
  method = past.method
  if is_image(given, method):
    return write_context(bound, past, Frames(given, 0.0, image_positions(method)))

  def write_block(past, inputs):
    n, x = inputs
    return write_context(bound, past, Frames(x, 0.0, block_positions(n, method))), None

  blocks = split_blocks(given, method)
  return jax.lax.scan(write_block, past, (jnp.arange(blocks.shape[0]), blocks))[0]


def is_image(given: Video, method: Method) -> bool:
  """Returns True where given frames are an image and not whole blocks.

  Raises UserError where they are neither.
  """
  image = given.shape[1] % method.block != 0
  if image and given.shape[1] != 1:
    raise UserError(
      f"{given.shape[1]} given latent frames: expected one, or whole blocks of {method.block}"
    )
  return image


def image_positions(method: Method) -> Positions:
  """Returns the frame index [1] of an image."""
  return jnp.asarray([method.block - 1], jnp.int32)


def blocks_of(given: Video | None, method: Method) -> int:
  """Returns the number of blocks that given frames take; an image takes one."""
  return 0 if given is None else -(-given.shape[1] // method.block)
