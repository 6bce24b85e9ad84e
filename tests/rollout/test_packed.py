"""Sampling from packed context, against a plain loop, and what it may not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.models.frames import Frames, bind
from hiar_jax.packing import orders
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.rows import History
from hiar_jax.packing.schedule import parse
from hiar_jax.rollout import packed
from hiar_jax.rollout.noise import block_noise
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

CONFIG = dataclasses.replace(tiny.CONFIG, packing=(1, 2))
SIGMAS = np.asarray([1.0, 0.6, 0.0], np.float32)
KEY = jax.random.key(3)
AS_PUBLISHED = History()
SEEDS = np.asarray([5, 9], np.int32)
VANILLA = "td_f3k2f1k1_g2"
CASES = {  # (schedule, steps, given frames, published indices)
  "vanilla": (VANILLA, orders.vanilla(4), 0, False),
  "vanilla, published": ("f1k1_x_td_f2k2f1k1_g2", orders.vanilla(3), 1, True),
  "both ends": ("td_f2k2f1k1_g2_x_f1k1", orders.both_ends(4), 0, False),
  "inverted": ("f1k1_x_g2_f1k1f2k2_td", orders.inverted(5), 1, True),
  "endpoints": ("td_f1k1_g2_x_f1k1", orders.endpoints(5, (0, 2, 4)), 0, False),
}


def sampler(schedule, steps, _, published, *, guidance=0.0, history=AS_PUBLISHED, codebook=None):
  sections = 1 + max(max(step) for step in steps)
  frames = sections * parse(schedule).generate
  generate = packed.make_sampler(
    CONFIG,
    parse(schedule),
    history,
    steps,
    jnp.asarray(SIGMAS),
    negative=0.3 * tiny.text()[:1],
    guidance=guidance,
    key=KEY,
    shape=tiny.shape(frames),
    published=published,
    codebook=codebook,
  )
  return quick_jit(generate)


def plain(schedule, steps, given, published, first, guidance=0.0, shown=lambda x: x):
  """The same videos, a forward at a time. shown: what history shows of a frame."""
  schedule = parse(schedule)
  params, text = tiny.params(CONFIG), tiny.text()
  sections = 1 + max(max(step) for step in steps)
  shape = tiny.shape(given + sections * schedule.generate)
  noise = block_noise(KEY, SEEDS, shape.block(schedule.generate))
  video = np.full((tiny.BATCH, *shape.clip), np.nan, np.float32)
  video[:, :given] = first
  run = quick_jit(lambda groups, text: bind(CONFIG, params, text)(groups).velocity[-1])
  for step in orders.plan(schedule, steps, given=given, published=published):
    x = jnp.concatenate([noise(0, n) for n in step.sections], axis=1)
    for sigma, lower in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
      groups = []
      for group, frames, at in zip(
        schedule.groups, step.context, step.context_indices, strict=True
      ):
        latents = np.stack(
          [shown(video[:, i]) if i >= 0 else np.zeros_like(video[:, 0]) for i in frames], axis=1
        )
        indices = np.maximum(at, 0).astype(np.int32)
        groups.append(Frames(latents, sigma, indices, projection=f"packed_k{group.pool}"))
      groups = (*groups, Frames(x, sigma, step.indices.astype(np.int32)))
      v = run(groups, text)
      if guidance:
        other = run(groups, np.repeat(0.3 * text[:1], tiny.BATCH, axis=0))
        v = flow.classifier_free_guidance(v, other, guidance)
      x = flow.euler(x, v, sigma, lower)
    assert np.isnan(video[:, step.generates]).all()
    video[:, step.generates] = x
  return video


@pytest.mark.parametrize("case", CASES)
def test_sections_equal_a_plain_loop(case):
  """And nothing is read before it is made: what is not made yet is NaN."""
  arguments = CASES[case]
  first = tiny.video(4, arguments[2]) if arguments[2] else None
  got = sampler(*arguments)(tiny.params(CONFIG), tiny.text(), SEEDS, first)
  want = plain(*arguments, first if first is not None else np.zeros(0).reshape(2, 0, 4, 2, 2))
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("case", ["both ends", "inverted"])
def test_discretised_history_equals_a_plain_loop(case):
  """What sections read is centroids, given frames too; what they make is not."""
  arguments = CASES[case]
  book = Codebook(tiny.random(8, 5, 2))

  def shown(frame):
    pixels = frame[..., None, :]
    return book.centroids[((pixels - book.centroids) ** 2).sum(-1).argmin(-1)]

  first = tiny.video(4, arguments[2]) if arguments[2] else None
  params, text = tiny.params(CONFIG), tiny.text()
  got = sampler(*arguments, codebook=book)(params, text, SEEDS, first)
  start = first if first is not None else np.zeros((2, 0, 4, 2, 2))
  np.testing.assert_allclose(got, plain(*arguments, start, shown=shown), atol=2e-5)
  assert (np.abs(got - plain(*arguments, start)).max((0, 2, 3, 4)) > 1e-3).any()
  np.testing.assert_array_equal(got[:, : start.shape[1]], start)


def test_guidance_equals_a_plain_loop():
  arguments = (VANILLA, orders.vanilla(2), 0, False)
  got = sampler(*arguments, guidance=2.0)(tiny.params(CONFIG), tiny.text(), SEEDS)
  want = plain(*arguments, np.zeros((2, 0, 4, 2, 2)), guidance=2.0)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_a_section_reads_the_frames_of_its_schedule_alone():
  """In time's order section n depends on the four frames before it, and on none further back."""
  schedule, first = parse(VANILLA), tiny.video(4, 8)
  run = sampler(VANILLA, orders.vanilla(1), 8, False)
  params, text = tiny.params(CONFIG), tiny.text()
  moved = [first + 0.1 * (np.arange(8) == i)[:, None, None, None] for i in range(8)]
  base = run(params, text, SEEDS, first)[:, 8:]
  read = [bool((run(params, text, SEEDS, x)[:, 8:] != base).any()) for x in moved]
  assert read == [i >= 8 - schedule.history for i in range(8)]


def test_a_video_does_not_depend_on_its_batch():
  run = sampler(*CASES["vanilla"])
  params, text = tiny.params(CONFIG), tiny.text()
  together, alone = run(params, text, SEEDS), run(params, text[1:], SEEDS[1:])
  np.testing.assert_allclose(together[1:], alone, atol=1e-5)


def test_clean_history_is_another_forward():
  arguments = CASES["vanilla"]
  params, text = tiny.params(CONFIG), tiny.text()
  as_section = sampler(*arguments)(params, text, SEEDS)
  for history in (History("clean"), History(hears=False)):
    other = sampler(*arguments, history=history)(params, text, SEEDS)
    assert np.isfinite(other).all()
    assert np.abs(other[:, 2:] - as_section[:, 2:]).max() > 1e-3
