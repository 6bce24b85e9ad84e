"""A video from one given latent frame: as a plain loop over visible frames has it, at the published
positions 0 | 1 2 3 | 4 5 6 ...
"""

import functools

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.rollout import sample
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few

BLOCKS = 3
ROWS = {
  "hiar": MethodConfig(block=2, window=0),
  "hiar_window": MethodConfig(block=2, window=4),
  "euler": MethodConfig(block=3, window=4, renoise="euler"),
  "self_forcing": MethodConfig(block=2, window=4, order="block_first", level="clean"),
  "self_aligned": MethodConfig(block=2, window=5, level="input", gradient="attached"),
}


def plain(row, table, image):
  """No cache and no shift: every forward sees the picture, the blocks before and its own, under a
  mask written out by hand.
  """
  k, sigmas = row.block, tiny.SIGMAS
  total = 1 + BLOCKS * k
  block_of = [0, *(1 + i // k for i in range(BLOCKS * k))]
  ends = [max(i for i in range(total) if block_of[i] == n) for n in range(BLOCKS + 1)]
  forward = tiny.full_forward("dit")

  def velocity(context, n, x, sigma):
    video, levels = tiny.video(0, total) * 0, np.zeros((tiny.BATCH, total), np.float32)
    video[:, :1] = image
    for m in range(1, n + 1):
      latents, level = (x, sigma) if m == n else context[m]
      video[:, 1 + (m - 1) * k : 1 + m * k], levels[:, 1 + (m - 1) * k : 1 + m * k] = latents, level
    mask = np.eye(total, dtype=bool)
    for q in range(ends[n] + 1):
      for p in range(ends[n] + 1):
        in_window = not row.window or p > ends[block_of[q]] - row.window
        mask[q, p] = block_of[p] == block_of[q] or (block_of[p] < block_of[q] and in_window)
    v = forward(tiny.params(), video, levels, np.arange(total, dtype=np.int32), mask)
    return np.asarray(v[:, ends[n] - k + 1 : ends[n] + 1])

  def step(context, n, x, level):
    v = velocity(context, n, x, sigmas[level])
    x0 = x - sigmas[level] * v
    if row.renoise == "euler":
      return x + (sigmas[level + 1] - sigmas[level]) * v, x0
    return (1 - sigmas[level + 1]) * x0 + sigmas[level + 1] * table[level + 1, n], x0

  xs, levels = {n: table[0, n] for n in range(1, BLOCKS + 1)}, range(len(sigmas) - 1)
  if row.order == "block_first":
    done = {}
    for n in xs:
      for level in levels:
        xs[n], _ = step(done, n, xs[n], level)
      done[n] = (xs[n], 0.0)
  else:
    for level in levels:
      context = {}
      for n in xs:
        before = xs[n]
        xs[n], _ = step(context, n, before, level)
        context[n] = (before, sigmas[level]) if row.level == "input" else (xs[n], sigmas[level + 1])
  return np.concatenate([image, *xs.values()], axis=1)


@functools.cache
def made(name):
  """(what the rollout gives, what the plain loop gives)."""
  row = ROWS[name]
  table, image = tiny.noise_table(row, BLOCKS + 1), tiny.video(5, 1)

  def run(params, table, image):
    shape, method = tiny.shape(BLOCKS * row.block), row.at(tiny.SIGMAS)
    return sample.rollout(tiny.bind("dit", params), tiny.lookup(table), method, shape, image)

  run = quick_jit(run)
  return np.asarray(run(tiny.params(), table, image)), plain(row, table, image), image


@pytest.mark.parametrize("name", few(ROWS, "hiar"))
def test_a_picture_stands_alone_before_whole_blocks(name):
  video, expected, image = made(name)
  assert video.shape[1] == 1 + BLOCKS * ROWS[name].block
  np.testing.assert_array_equal(video[:, :1], image)
  np.testing.assert_allclose(video, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_picture_matters():
  row = ROWS["hiar"]
  table = tiny.noise_table(row, BLOCKS + 1)
  video, _, image = made("hiar")
  other = plain(row, table, image + 1)
  assert np.abs(other - video)[:, 1:].max() > 1e-2


def test_given_frames_are_one_or_whole_blocks():
  row = ROWS["hiar"]
  with pytest.raises(UserError, match="3 given latent frames: expected one, or whole blocks of 2"):
    sample.rollout(tiny.bind(), None, row.at(tiny.SIGMAS), tiny.shape(4), tiny.video(5, 3))
