"""The past of an endless packed video shows a section what the whole video would show it."""

import jax
import numpy as np
import pytest

from hiar_jax.packing import orders
from hiar_jax.packing.rows import tables
from hiar_jax.packing.schedule import parse
from hiar_jax.rollout import packed_past

# each operation by itself would be compiled for every length
extended = jax.jit(packed_past.extended, static_argnums=0)
CASES = {  # (schedule, given frames, published indices)
  "tail deleted": ("td_f3k2f1k1_g2", 0, False),
  "section longer than history": ("td_f1k1_g4", 1, False),
  "first frames": ("f2k1f1k2_x_td_f2k2f1k1_g2", 0, False),
  "first frames, published": ("f1k1_x_td_f3k2f2k1_g3", 2, True),
  "mean": ("tc_f2k2f1k1_g2", 0, False),
  "mean beyond first frames": ("f3k1_x_tc_f2k2_g2", 4, False),
  "mean, long section": ("f1k1_x_tc_f1k1_g5", 2, False),
  "places behind the section": ("td_f2k1_g2_f1k1", 0, False),
}


def frames_at(video, numbers):
  """rows.frames_at of numbers [k], in numpy."""
  there = (numbers >= 0)[None, :, None, None, None]
  return np.where(there, video[:, np.maximum(numbers, 0)], 0)


def mean_at(video, inside):
  """The mean of rows.sum_at, in numpy."""
  return video[:, : len(inside)][:, inside > 0].mean(1, keepdims=True)


@pytest.mark.parametrize("case", CASES)
def test_it_shows_what_the_whole_video_shows(case):
  """Seven sections; frame n holds n + 1, and random numbers beside it. Also where frames beyond
  an x and some of the tail leave the last ones at once.
  """
  notation, given, published = CASES[case]
  schedule = parse(notation)
  width, frames = schedule.generate, given + 7 * schedule.generate
  video = np.random.default_rng(0).normal(size=(2, frames, 1, 1, 2)).astype(np.float32)
  video[..., 0] = 1 + np.arange(frames)[None, :, None, None]
  past = packed_past.empty(schedule, np.zeros(2, np.int32), (1, 1, 2))
  size, ends = past.latents.shape, [given, *range(given + width, frames + 1, width)]
  plan = orders.plan(schedule, orders.vanilla(7), given=given, published=published)
  for section, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
    if end > start:
      part = video[:, start:end]
      latents = extended(schedule, past.latents, past.frames, part)
      past = past.replace(latents=latents, frames=np.int32(end), sections=np.int32(section))
    assert past.latents.shape == size
    if section == 7:
      break
    (table,) = tables([plan[section]])
    want = jax.tree.map(lambda x: x[0], table)
    got = packed_past.row_of(schedule, past, published=published)
    assert got.sections == want.sections == section
    np.testing.assert_array_equal(got.indices, want.indices)
    latents = np.asarray(past.latents)
    for mine, theirs in zip(got.context, want.context, strict=True):
      np.testing.assert_array_equal(frames_at(latents, mine), frames_at(video, theirs))
    for mine, theirs in zip(got.context_indices, want.context_indices, strict=True):
      np.testing.assert_array_equal(mine, theirs)
    tail, whole = got.tails[0], want.tails[0]
    assert (tail is None) == (whole is None) and got.tails[1] is None
    if tail is not None:
      np.testing.assert_array_equal(tail.indices, whole.indices)
      found, expected = mean_at(latents, tail.frames), mean_at(video, whole[0])
      np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_appended_tail_has_no_fixed_size():
  with pytest.raises(ValueError, match="ta_f1k1_g2: an appended tail grows with the video"):
    packed_past.slots(parse("ta_f1k1_g2"))
