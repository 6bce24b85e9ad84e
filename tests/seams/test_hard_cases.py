"""Ten hard cases through the seams: a plain network and new loops, against the package's own.

Each compares two ways of computing one thing: hiar_jax's loops, which make masks over a whole
forward of models.dit, and tests.seams, whose groups say what they read, on tests.seams.plain_wan
with the same parameters. A case that does not fit changes the signatures, not the case.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import method as methods
from hiar_jax.models import dit
from hiar_jax.rollout import exit_step, image_to_video, sample
from hiar_jax.rollout.past import ring as caches
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.seams import context, frames, loops
from tests.seams.cases import NETWORK, ROWS, assert_close, bound, method_of, noise_of, shape
from tests.seams.frames import Frames, Read
from tests.seams.ring import Ring


def old_rollout(row: methods.Method, count: int, loop=sample.rollout, **given):
  """Today's whole video. given: the loop's own name for given frames -> them."""
  given_frames = sum(x.shape[1] for x in given.values())

  def run(params):
    cache = caches.empty(
      tiny.CONFIG,
      row,
      batch=tiny.BATCH,
      frames=given_frames + count * row.block,
      height=tiny.HEIGHT,
      width=tiny.WIDTH,
    )
    noise = noise_of(row, count + -(-given_frames // row.block))
    forward = dit.bind(tiny.CONFIG, params, tiny.text())
    return loop(forward, noise, cache, jnp.asarray(tiny.SIGMAS), row, count, **given)

  return quick_jit(run)(tiny.params())


def new_rollout(row: methods.Method, count: int, given=None, sink_positions="absolute"):
  given_blocks = 0 if given is None else -(-given.shape[1] // row.block)
  noise = noise_of(row, count + given_blocks)
  run = quick_jit(
    lambda b: loops.rollout(b, noise, method_of(row), shape(count * row.block), given)
  )
  return run(bound())


# ------------------------------------------------------------------------ 1: the pair, a full ring


def test_1_the_pair_in_a_full_ring():
  """Window 21, block 8: the noisy block must not see slots 3 to 5, its context sees all 18."""
  row = methods.Method()
  method = method_of(row)
  past = Ring.empty(NETWORK, method, shape(30), tiny.BATCH)
  assert past.slots == 18
  for n in range(7):  # blocks 0 to 6: 6 overwrote 0
    positions = loops.block_positions(n, method)
    past = past.write(NETWORK.empty_kv(3, 2, 4, 2), tiny.video(n, 3), positions)
  context, noisy = (Frames(tiny.video(n, 3), 0.5, loops.block_positions(n, method)) for n in (7, 8))
  (context, noisy), _ = past.read((context, noisy))
  assert context.reads[0].seen.all()
  assert np.flatnonzero(~noisy.reads[0].seen).tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ROWS)
def test_1_whole_videos_are_those_of_today(name):
  row = ROWS[name]
  count = 10 if name == "published" else 4
  assert_close(new_rollout(row, count), old_rollout(row, count))


@pytest.mark.parametrize("name", ["sink across blocks", "input", "block first"])
def test_1_a_continuation(name):
  row, given = ROWS[name], tiny.video(3, 6)
  assert_close(new_rollout(row, 3, given), old_rollout(row, 3, given=given))


# ------------------------------------------------------------------------------ 3: SAF's exit step

EXITS = {
  "detached output": methods.Method(window=7, sink=1),
  "attached output": methods.Method(window=6, gradient="attached"),
  "euler": methods.Method(window=0, renoise="euler"),
  "block first": ROWS["block first"],
  "input, detached": methods.Method(window=8, sink=1, level="input"),
  "clean sink, attached": methods.Method(
    window=8, sink=3, level="input", sink_level="clean", gradient="attached"
  ),
  "clean sink, detached": methods.Method(window=8, sink=3, level="input", sink_level="clean"),
}


@pytest.mark.parametrize("name", EXITS)
def test_3_the_exit_step_and_its_gradient(name):
  row, count = EXITS[name], 3
  noise, weight = noise_of(row, count), tiny.video(5, count * row.block)

  def old(params, frozen):
    text = tiny.text()
    forward, frozen = (dit.bind(tiny.CONFIG, p, text) for p in (params, frozen))
    cache = caches.empty(
      tiny.CONFIG,
      row,
      batch=tiny.BATCH,
      frames=count * row.block,
      height=tiny.HEIGHT,
      width=tiny.WIDTH,
    )
    sigmas = jnp.asarray(tiny.SIGMAS)
    x0 = exit_step.self_rollout(forward, frozen, noise, cache, sigmas, row, count, 1)
    return (x0 * weight).mean(), x0

  def new(params):
    b = frames.bind(NETWORK, params, tiny.text())
    x0 = loops.self_rollout(b, noise, method_of(row), shape(count * row.block), 1)
    return (x0 * weight).mean(), x0

  (_, old_x0), old_gradient = quick_jit(jax.value_and_grad(old, has_aux=True))(
    tiny.params(), tiny.params()
  )
  (_, new_x0), new_gradient = quick_jit(jax.value_and_grad(new, has_aux=True))(tiny.params())
  assert_close(new_x0, old_x0, "x0")
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(new_gradient), jax.tree.leaves(old_gradient), strict=True
  ):
    assert_close(a, b, jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------- 5: a picture's start


@pytest.mark.parametrize("name", ["window inside blocks", "sink across blocks", "block first"])
def test_5_a_picture(name):
  """One given frame is the last of block 0, whose other slots stay empty."""
  row, image = ROWS[name], tiny.video(8, 1)
  old = old_rollout(row, 4, image_to_video.rollout, image=image)
  assert_close(new_rollout(row, 4, image), old)


# -------------------------------------------------------------------- 6: two texts in one forward


def test_6_a_texts_keys_and_values_are_kept():
  """encode_text once per prompt gives what a forward makes of the text itself."""
  texts = jnp.stack([tiny.text(), tiny.text()[::-1]])
  groups = tuple(
    Frames(tiny.video(n, 3), sigma, 3 * n + jnp.arange(3), text=n, reads=reads)
    for n, sigma, reads in ((0, 0.2, ()), (1, 0.7, (Read(group=0),)))
  )
  direct = bound().with_texts(texts)(groups)
  kept = bound().with_texts(NETWORK.encode_text(tiny.params(), texts))(groups)
  assert_close(kept, direct)
  swapped = bound().with_texts(texts[::-1])(groups)
  assert np.abs(swapped.velocity[0] - direct.velocity[0]).max() > 1e-2


# ------------------------------------------------------------- 8: a context level that adds noise


def test_8_a_context_that_adds_noise():
  """Against a loop that keeps no K/V: every forward is over all blocks so far."""
  row, count, level = methods.Method(window=7, sink=1), 4, 0.3
  method = dataclasses.replace(method_of(row), context=context.Fixed(level))
  noise = noise_of(row, count)
  new = quick_jit(lambda b: loops.rollout(b, noise, method, shape(count * 3), None))(bound())
  assert_close(new, plain_fixed(row, count, level, noise)[-1])
  drawn = lambda j, n: noise(j, n) + (j > method.levels)  # contexts have draws of their own
  other = quick_jit(lambda b: loops.rollout(b, drawn, method, shape(count * 3), None))(bound())
  assert np.abs(other - new).max() > 1e-2


def plain_fixed(row, count, level, noise):
  """Videos at all levels, where contexts are x0 with noise at `level`; no cache, no pair."""
  forward = quick_jit(dit.bind(tiny.CONFIG, tiny.params(), tiny.text()))
  k, sigmas = row.block, tiny.SIGMAS
  xs = [noise(0, n) for n in range(count)]
  videos = []
  for j in range(sigmas.size - 1):
    contexts = []
    for n in range(count):
      x = jnp.concatenate([*contexts, xs[n]], axis=1)
      positions = jnp.arange(x.shape[1])
      mask = exit_step.block_causal_mask(positions, row)
      at = jnp.where(positions < n * k, level, sigmas[j])
      v, _ = forward(x, jnp.broadcast_to(at, x.shape[:2]), positions, mask=mask)
      x0 = xs[n] - sigmas[j] * v[:, -k:]
      xs[n] = (1 - sigmas[j + 1]) * x0 + sigmas[j + 1] * noise(j + 1, n)
      contexts.append((1 - level) * x0 + level * noise(sigmas.size + j, n))
    videos.append(jnp.concatenate(xs, axis=1))
  return videos


def test_8_the_exit_step_of_a_context_that_adds_noise():
  """The parallel exit step gives the sequential one's values."""
  row, count = methods.Method(window=7, sink=1), 3
  method = dataclasses.replace(method_of(row), context=context.Fixed(0.3))
  noise = noise_of(row, count)
  past = Ring.empty(NETWORK, method, shape(9), tiny.BATCH)

  def sequential(b):
    xs = loops.step_first(b, noise, past, method, count, 2)
    return loops.join_blocks(loops.sweep(b, noise, past, xs, 2)[2])

  new = quick_jit(lambda b: loops.self_rollout(b, noise, method, shape(9), 2))(bound())
  assert_close(new, quick_jit(sequential)(bound()))
