"""Hard cases through the seams: whole videos and training's exit step.

Each runs the package's loops on tests.seams.plain_wan, a network with another layout of K/V and no
masks over a forward, and compares with what was recorded (tests.seams.cases), or with a plain loop.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.models import frames
from hiar_jax.models.frames import Frames, Read
from hiar_jax.rollout import exit_step, sample
from hiar_jax.rollout.past.clip_groups import clip_reads
from hiar_jax.rollout.past.ring import Ring
from hiar_jax.rollout.past.visibility import block_positions
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few, slow
from tests.seams.cases import NETWORK, ROWS, assert_close, bound, method_of, noise_of, shape


def rollout(row: MethodConfig, count: int, given=None):
  """Whole videos of `count` new blocks."""
  noise = noise_of(row, count + (0 if given is None else -(-given.shape[1] // row.block)))
  method = method_of(row)
  run = quick_jit(lambda b: sample.rollout(b, noise, method, shape(count * row.block), given))
  return run(bound())


# ------------------------------------------------------------------------ 1: the pair, a full ring


def test_1_the_pair_in_a_full_ring():
  """Window 21, block 8: the noisy block must not see slots 3 to 5, its context sees all 18."""
  method = method_of(MethodConfig())
  past = Ring.empty(NETWORK, method, shape(30), tiny.BATCH)
  assert past.slots == 18
  for n in range(7):  # blocks 0 to 6: 6 overwrote 0
    positions = block_positions(n, method)
    past = past.write(NETWORK.empty_kv(3, 2, 4, 2), Frames(tiny.video(n, 3), 0.0, positions))
  context, noisy = (Frames(tiny.video(n, 3), 0.5, block_positions(n, method)) for n in (7, 8))
  (context, noisy), _ = past.read((context, noisy))
  assert context.reads[0].seen.all()
  assert np.flatnonzero(~noisy.reads[0].seen).tolist() == [3, 4, 5]


QUICK = ("sink across blocks", "input", "clean sink")


@pytest.mark.parametrize("name", few(ROWS, *QUICK))
def test_1_whole_videos_are_those_of_today(name):
  row = ROWS[name]
  count = 10 if name == "published" else 4
  assert_close(rollout(row, count), f"video {name}")


@pytest.mark.parametrize("name", ["sink across blocks", *slow("input", "block first")])
def test_1_a_continuation(name):
  row, given = ROWS[name], tiny.video(3, 6)
  assert_close(rollout(row, 3, given), f"continuation {name}")


# ------------------------------------------------------------------------------ 3: SAF's exit step

EXITS = {
  "detached output": MethodConfig(window=7, sink=1),
  "attached output": MethodConfig(window=6, gradient="attached"),
  "euler": MethodConfig(window=0, renoise="euler"),
  "block first": ROWS["block first"],
  "input, detached": MethodConfig(window=8, sink=1, level="input"),
  "clean sink, attached": MethodConfig(
    window=8, sink=3, level="input", sink_level="clean", gradient="attached"
  ),
  "clean sink, detached": MethodConfig(window=8, sink=3, level="input", sink_level="clean"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXITS)
def test_3_the_exit_step_and_its_gradient(name):
  row, count = EXITS[name], 3
  noise, weight = noise_of(row, count), tiny.video(5, count * row.block)

  def run(params):
    b = frames.bind(NETWORK, params, tiny.text())
    x0 = exit_step.self_rollout(b, noise, method_of(row), shape(count * row.block), 1)
    return (x0 * weight).mean(), x0

  (_, x0), gradient = quick_jit(jax.value_and_grad(run, has_aux=True))(tiny.params())
  assert_close(x0, f"exit {name}")
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    path = jax.tree_util.keystr(path)
    assert_close(leaf, f"gradient {name} {path}", path)


# ---------------------------------------------------------------------------- 5: a picture's start


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["block first", *slow("window inside blocks", "sink across blocks")]
)
def test_5_a_picture(name):
  """One given frame is the last of block 0, whose other slots stay empty."""
  row, image = ROWS[name], tiny.video(8, 1)
  assert_close(rollout(row, 4, image), f"picture {name}")


# -------------------------------------------------------------------- 6: two texts in one forward


def test_6_a_texts_keys_and_values_are_kept():
  """encode_text once per prompt gives what a forward makes of the text itself."""
  texts = jnp.stack([tiny.text(), tiny.text()[::-1]])
  groups = tuple(
    Frames(tiny.video(n, 3), sigma, 3 * n + jnp.arange(3), text=n, reads=reads)
    for n, sigma, reads in ((0, 0.2, ()), (1, 0.7, (Read(group=0),)))
  )
  forward = quick_jit(lambda texts: bound().with_texts(texts)(groups))
  direct = forward(texts)
  kept = forward(quick_jit(NETWORK.encode_text)(tiny.params(), texts))
  assert_close(kept, direct)
  swapped = forward(texts[::-1])
  assert np.abs(swapped.velocity[0] - direct.velocity[0]).max() > 1e-2


# ------------------------------------------------------------- 8: a context level that adds noise


@pytest.mark.slow
def test_8_a_context_that_adds_noise():
  """Against a loop that keeps no K/V: every forward is over all blocks so far."""
  row, count = MethodConfig(window=7, sink=1, level="fixed:0.3"), 4
  noise = noise_of(row, count)
  video = rollout(row, count)
  assert_close(video, plain_fixed(row, count, 0.3, noise))

  def shifted(level, n):  # contexts have draws of their own
    return noise(level, n) + (level >= tiny.SIGMAS.size)

  other = sample.rollout(bound(), shifted, method_of(row), shape(count * 3))
  assert np.abs(other - video).max() > 1e-2


def plain_fixed(row: MethodConfig, count: int, level: float, noise):
  """The video where contexts are x0 with noise at `level`; no past, no pair."""
  b, k, sigmas = bound(), row.block, tiny.SIGMAS
  run = quick_jit(lambda groups: b(groups).velocity[-1])
  xs = [noise(0, n) for n in range(count)]
  for j in range(sigmas.size - 1):
    contexts = []
    for n in range(count):
      blocks, at = [*contexts, xs[n]], [level] * n + [sigmas[j]]
      shown = {m: Read(group=m) for m in range(n)}
      groups = tuple(
        Frames(x, sigma, m * k + np.arange(k), clip_reads(row, m, shown))
        for m, (x, sigma) in enumerate(zip(blocks, at, strict=True))
      )
      x0 = xs[n] - sigmas[j] * run(groups)
      xs[n] = (1 - sigmas[j + 1]) * x0 + sigmas[j + 1] * noise(j + 1, n)
      contexts.append((1 - level) * x0 + level * noise(sigmas.size + j, n))
  return jnp.concatenate(xs, axis=1)


@pytest.mark.slow
def test_8_the_exit_step_of_a_context_that_adds_noise():
  """The parallel exit step gives the sequential one's values."""
  row, count = MethodConfig(window=7, sink=1, level="fixed:0.3"), 3
  method, noise = method_of(row), noise_of(row, count)
  parallel = quick_jit(lambda b: exit_step.self_rollout(b, noise, method, shape(9), 2))
  sequential = quick_jit(
    lambda b: exit_step.self_rollout_without_gradient(b, noise, method, shape(9), 2)
  )
  assert_close(parallel(bound()), sequential(bound()))
