"""Every rollout again: loops over levels and blocks, each step one forward over a block and all it
sees, as groups of that forward. No past, no scan, and only static reads.

Written from hiar_jax.method's table, not from hiar_jax.rollout.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.method import Method
from hiar_jax.models.frames import Frames, Read
from tests.helpers.compiling import quick_jit


class Oracle:
  """A network with its parameters, text [b l d], method and noise(level, block) [b k h w c].

  blocks: contexts (latents, sigma) of blocks before n, and block n itself.
  """

  def __init__(self, network, params, text, method: Method, noise: Callable, start=None):
    self.network, self.params, self.text = network, params, jnp.asarray(text)[None]
    self.method, self.noise, self.start = method, functools.cache(noise), start
    self.forward = quick_jit(self.velocity)

  def groups(self, blocks: list) -> tuple[Frames, ...]:
    """Returns the blocks as groups, and behind them copies of a sink that moves along.

    A reader of a relative sink sees a copy of block 0 at other positions, which is the same but for
    the rotation of its keys, since rotations see differences alone.
    """
    k, moved = self.method.block, []
    groups = []
    for n, (x, sigma) in enumerate(blocks):
      last, reads = n * k + k - 1, []
      distance = max(last + 1 - self.method.window, 0) if self.method.moves_sink else 0
      for m in range(n):
        seen = [p for p in range(k) if self.sees(last, m * k + p)]
        source = m
        if distance and m * k < self.method.sink:  # the sink ends in block 0
          moved.append((*blocks[0], jnp.arange(k) + distance))
          source = len(blocks) + len(moved) - 1
          rest = [p for p in seen if p >= self.method.sink]
          reads += [Read(group=m, frames=(p, p + 1)) for p in rest]
          seen = [p for p in seen if p < self.method.sink]
        if seen:
          reads.append(Read(group=source, frames=(seen[0], seen[-1] + 1)))
      groups.append(Frames(x, sigma, jnp.arange(n * k, n * k + k), tuple(reads)))
    return (*groups, *(Frames(*block) for block in moved))

  def sees(self, last: int, p: int) -> bool:
    """Whether a block that ends at frame `last` sees frame p of an earlier one."""
    row = self.method
    return not row.window or p < row.sink or p > last - (row.window - row.sink)

  def velocity(self, params, blocks: list):
    """Returns the velocity of the last block, differentiable in everything."""
    out = self.network.apply(params, self.groups(blocks), self.text, (), self.start)
    return out.velocity[len(blocks) - 1]

  def velocity_detached(self, params, blocks: list):
    """Returns the same, where no gradient passes through the contexts' K/V."""
    *contexts, (x, sigma) = blocks
    *others, last = self.groups(blocks)
    kept = ()
    if contexts:
      kept = self.network.apply(params, tuple(others), self.text, (), self.start).kv
      kept = jax.lax.stop_gradient(kept)
    reads = tuple(Read(past=read.group, frames=read.frames) for read in last.reads)
    last = last.replace(reads=reads)
    return self.network.apply(params, (last,), self.text, kept, self.start).velocity[0]

  def step(self, contexts: list, n: int, x, level: int):
    """Returns (x at the next level, (latents, sigma) of its context, x0)."""
    sigma, lower = self.method.sigmas[level : level + 2]
    v = self.forward(self.params, [*contexts[:n], (x, jnp.float32(sigma))])
    x0 = x - sigma * v
    x_next = (1 - lower) * x0 + lower * self.noise(level + 1, n)
    if self.method.level == "half":
      half = lower / 2
      shown = (1 - half) * x0 + half * self.noise(self.method.levels + 1 + level, n), half
    else:
      shown = {"output": (x_next, lower), "clean": (x0, 0.0)}[self.method.level]
    return x_next, (shown[0], jnp.float32(shown[1])), x0

  def walk(self, blocks: int, stop: int) -> tuple[list, list, list]:
    """Returns the blocks as they enter the level `stop`, their contexts and their x0 there."""
    xs, contexts = [self.noise(0, n) for n in range(blocks)], []
    before, x0s = list(xs), [None] * blocks
    if self.method.order == "block_first":
      for n in range(blocks):
        x = xs[n]
        for level in range(stop + 1):
          before[n] = x
          x, shown, x0s[n] = self.step(contexts, n, x, level)
        contexts.append(shown)
      return before, contexts, x0s
    for level in range(stop + 1):
      contexts, before = [], list(xs)
      for n in range(blocks):
        xs[n], shown, x0s[n] = self.step(contexts, n, xs[n], level)
        contexts.append(shown)
    return before, contexts, x0s

  def video(self, blocks: int) -> np.ndarray:
    """Returns the latents [b f h w c] of a whole video."""
    return np.concatenate(self.walk(blocks, self.method.levels - 1)[2], axis=1)
