"""Every rollout again, in the plainest way: loops over blocks and levels, one forward over what is
visible, no cache.

Written from the table of method.MethodConfig and the papers' algorithms, not from hiar_jax.rollout.
"""

import dataclasses

import numpy as np

from hiar_jax.method import MethodConfig
from tests.helpers import tiny


def sees(query: int, key: int, row: MethodConfig) -> bool:
  """Whether a frame may attend to another."""
  end = query - query % row.block + row.block - 1
  if key > end:
    return False
  if key // row.block == query // row.block or not row.window:
    return True
  return key < row.sink or key > end - (row.window - row.sink)


def shown_at(row: MethodConfig, level: int) -> float:
  """The noise level of contexts in the step from `level`."""
  if row.level.startswith("fixed:"):
    return float(row.level.removeprefix("fixed:"))
  return {"output": tiny.SIGMAS[level + 1], "clean": 0.0, "input": tiny.SIGMAS[level]}[row.level]


class Plain:
  """A network and a row of the table."""

  def __init__(self, network: str, row: MethodConfig, frames: int, table: np.ndarray, params=None):
    self.network, self.row, self.frames, self.table = network, row, frames, table
    self.params = tiny.NETWORKS[network][1] if params is None else params

  def velocity(
    self, context: dict[int, tuple[np.ndarray, float]], n: int, x: np.ndarray, sigma: float
  ) -> np.ndarray:
    """Block n at `sigma`, seeing context[m] = (latents, level) of blocks m < n; padded with blind
    frames.
    """
    k = self.row.block
    video, levels = tiny.video(0, self.frames) * 0, np.zeros((tiny.BATCH, self.frames), np.float32)
    mask = np.eye(self.frames, dtype=bool)
    for m in range(n + 1):
      latents, level = context[m] if m < n else (x, sigma)
      video[:, m * k : m * k + k], levels[:, m * k : m * k + k] = latents, level
    for q in range(n * k + k):
      for p in range(n * k + k):
        mask[q, p] = sees(q, p, self.row)
    positions = np.arange(self.frames, dtype=np.int32)
    v = tiny.full_forward(self.network)(self.params, video, levels, positions, mask)
    return np.asarray(v[:, n * k : n * k + k])

  def step(self, context, n: int, x, level: int):
    """(x at the next level, x0)."""
    sigma, lower = tiny.SIGMAS[level], tiny.SIGMAS[level + 1]
    v = self.velocity(context, n, x, sigma)
    x0 = x - sigma * v
    if self.row.renoise == "euler":
      return x + (lower - sigma) * v, x0
    return (1 - lower) * x0 + lower * self.table[level + 1, n], x0

  def shown(self, n: int, level: int, x, x_next, x0) -> tuple[np.ndarray, float]:
    """(latents, level) of block n as context, for the step from `level`."""
    at = shown_at(self.row, level)
    if self.row.level.startswith("fixed"):  # its draws stand behind those of the levels
      return (1 - at) * x0 + at * self.table[tiny.SIGMAS.size + level, n], at
    return {"output": x_next, "clean": x0, "input": x}[self.row.level], at

  def block_first(self, given: list, blocks: int, stop: int) -> tuple[list, list, list]:
    context = {m: (latents, 0.0) for m, latents in enumerate(given)}
    before, x0s = list(given), list(given)
    for n in range(len(given), blocks):
      x = self.table[0, n]
      for level in range(stop + 1):
        last = x
        x, x0 = self.step(context, n, x, level)
      before.append(last)
      context[n] = self.shown(n, stop, last, x, x0)
      x0s.append(x0)
    return before, [context[n][0] for n in range(blocks)], x0s

  def step_first(self, given: list, blocks: int, stop: int) -> tuple[list, list, list]:
    xs = {n: self.table[0, n] for n in range(len(given), blocks)}
    for level in range(stop + 1):
      context = {m: (latents, 0.0) for m, latents in enumerate(given)}
      before, x0s = list(given), list(given)
      for n in sorted(xs):
        x = xs[n]
        xs[n], x0 = self.step(context, n, x, level)
        before.append(x)
        x0s.append(x0)
        context[n] = self.shown(n, level, x, xs[n], x0)
    return before, [context[n][0] for n in range(blocks)], x0s

  def clean_sink(self, blocks: int, stop: int) -> list:
    """The first blocks' x0, generated before all else, where the row wants that."""
    if self.row.order == "block_first" or self.row.sink_level != "clean":
      return []
    row = dataclasses.replace(self.row, sink_level="history")
    plain = Plain(self.network, row, self.frames, self.table, self.params)
    return plain.step_first([], min(self.row.sink // self.row.block, blocks), stop)[2]

  def rollout(self, blocks: int, given: list | None = None, stop: int | None = None) -> list:
    """x0 of `blocks` blocks, the given ones included, at the level `stop` (the last)."""
    stop = tiny.SIGMAS.size - 2 if stop is None else stop
    walk = self.block_first if self.row.order == "block_first" else self.step_first
    return walk(given or self.clean_sink(blocks, stop), blocks, stop)[2]

  def before(self, blocks: int, stop: int) -> tuple[list, list, list]:
    """The blocks as they enter the level `stop`, what they show there, and the clean sink's blocks
    (none).
    """
    row, head = self.row, self.clean_sink(blocks, stop)
    walk = self.block_first if row.order == "block_first" else self.step_first
    before, shown, _ = walk(head, blocks, stop)
    if head:  # the sink's own blocks are noisy like any other
      row = dataclasses.replace(row, sink_level="history")
      plain = Plain(self.network, row, self.frames, self.table, self.params)
      before[: len(head)] = plain.step_first([], len(head), stop)[0]
    return before, shown, head


ROWS = {
  "hiar": MethodConfig(block=2, window=0),
  "hiar_window": MethodConfig(block=2, window=4),
  "hiar_sink": MethodConfig(block=2, window=5, sink=1),
  "hiar_sink_across_blocks": MethodConfig(block=2, window=6, sink=3),
  "hiar_clean_sink": MethodConfig(block=2, window=6, sink=2, sink_level="clean"),
  "hiar_frames": MethodConfig(block=1, window=3, sink=1),
  "euler": MethodConfig(block=2, window=0, renoise="euler"),
  "clean": MethodConfig(block=2, window=5, level="clean"),
  "fixed": MethodConfig(block=2, window=5, level="fixed:0.3"),
  "input": MethodConfig(block=2, window=5, sink=1, level="input"),
  "self_aligned": MethodConfig(
    block=2, window=5, sink=2, sink_level="clean", level="input", gradient="attached"
  ),
  "self_aligned_euler": MethodConfig(
    block=1, window=4, sink=2, sink_level="clean", level="input", renoise="euler"
  ),
  "self_forcing": MethodConfig(block=2, window=0, order="block_first", level="clean"),
  "self_forcing_window": MethodConfig(
    block=2, window=5, sink=1, order="block_first", level="clean"
  ),
  "self_forcing_fixed": MethodConfig(
    block=2, window=5, order="block_first", level="fixed:0.2", renoise="euler"
  ),
  "self_forcing_euler": MethodConfig(
    block=2, window=3, order="block_first", level="clean", renoise="euler"
  ),
}


def assert_same(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
