"""Intervals hold a known truth as often as they say, by prompts; pairs are compared as pairs."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.evaluation import bootstrap, rows, shapes_truth
from hiar_jax.evaluation.shapes_passage import Passage, summarise

PROMPTS, EACH = 27, 3  # as many prompts as the world holds out
TRUTH = 0.6


def row(values, name="row", prompts=None, frames=20, **metrics) -> rows.Row:
  """A row whose error in every fifth is values [n], or [n 5]; metrics: others, {name: (sums,
  counts)}.
  """
  values = np.asarray(values, float)
  values = np.broadcast_to(values.reshape(len(values), -1), (len(values), 5))
  ones, nothing = np.ones((len(values), 5)), np.zeros((len(values), 5))
  sums = {name: nothing for name in rows.FIFTHS} | {name: nothing[:, :1] for name in rows.WHOLE}
  counts = {name: np.ones_like(x) for name, x in sums.items()}
  sums["error"], counts["error"] = values, ones
  for metric, (a, b) in metrics.items():
    sums[metric], counts[metric] = np.asarray(a, float), np.asarray(b, float)
  prompts = tuple(prompts or (f"prompt {i % PROMPTS}" for i in range(len(values))))
  return rows.Row(name, "run", "", {"frames": frames}, {}, {}, prompts, sums, counts)


def clustered(rng) -> np.ndarray:
  """Videos of PROMPTS prompts: what they have in common varies more than what they have not."""
  of_prompt = rng.normal(TRUTH, 0.3, PROMPTS)
  return np.tile(of_prompt, EACH) + rng.normal(0, 0.1, PROMPTS * EACH)


def holds(interval, value) -> bool:
  return interval[0] <= value <= interval[1]


@pytest.mark.slow
def test_an_interval_holds_the_truth_as_often_as_it_says():
  """Percentile intervals of 27 prompts: somewhat less than 95 of 100."""
  found = [
    bootstrap.intervals(row(clustered(np.random.default_rng(i))), resamples=500)["error"]["total"]
    for i in range(300)
  ]
  coverage = np.mean([holds(interval, TRUTH) for interval in found])
  assert 0.90 < coverage < 0.97


def test_videos_of_a_prompt_stay_together():
  """Drawn one by one, three videos of a prompt would count as three prompts: too narrow by far."""
  values = clustered(np.random.default_rng(0))
  together = bootstrap.intervals(row(values))["error"]["total"]
  apart = bootstrap.intervals(row(values, prompts=[str(i) for i in range(len(values))]))["error"]
  assert np.diff(together) > 1.5 * np.diff(apart["total"])
  # the spread of the mean of the prompts' means
  spread = values.reshape(EACH, PROMPTS).mean(0).std() / np.sqrt(PROMPTS)
  assert np.diff(together) == pytest.approx(2 * 1.96 * spread, rel=0.06)


def test_ratios_are_of_sums_not_means_of_ratios():
  """A video that hardly moves weighs as little in its bounds as in the table."""
  motion = np.linspace(1, 9, 10)[:, None] * np.ones(5)
  expected = np.asarray([1.0, *[10.0] * 9])[:, None] * np.ones(5)
  counts = np.asarray([1, *[4] * 9])[:, None] * np.ones(5)
  one = row(
    np.ones(10),
    prompts=[str(i) for i in range(10)],
    motion=(motion * counts, counts),
    expected_motion=(expected * counts, counts),
  )
  want = (motion * counts).sum() / (expected * counts).sum()
  assert bootstrap.means(one)["motion_ratio"]["total"] == pytest.approx(want)
  drawn = bootstrap.draw(10, 400)
  redrawn = (drawn @ (motion * counts).sum(1)) / (drawn @ (expected * counts).sum(1))
  got = bootstrap.intervals(one, resamples=400)["motion_ratio"]["total"]
  np.testing.assert_allclose(got, np.percentile(redrawn, (2.5, 97.5)))


def test_the_last_fifth_over_the_first_is_a_ratio_of_means():
  rng = np.random.default_rng(0)
  values = rng.uniform(1, 3, (PROMPTS, 5))
  one = row(values)
  assert bootstrap.means(one)["error_last_over_first"] == pytest.approx(
    values[:, -1].mean() / values[:, 0].mean()
  )
  drawn = bootstrap.draw(PROMPTS, 300, seed=4)
  order = np.argsort(np.unique(one.prompts, return_inverse=True)[1])  # the prompts by their names
  redrawn = (drawn @ values[order, -1]) / (drawn @ values[order, 0])
  got = bootstrap.intervals(one, resamples=300, seed=4)["error_last_over_first"]
  np.testing.assert_allclose(got, np.percentile(redrawn, (2.5, 97.5)))


def test_a_pair_is_compared_prompt_by_prompt():
  """What a prompt costs both rows is no part of their difference."""
  rng = np.random.default_rng(1)
  a = clustered(rng)
  b = a + 0.05 + rng.normal(0, 0.05, len(a))
  first, second = row(a), row(b, name="other")
  found = bootstrap.difference(second, first)
  value, interval = found["value"]["error"]["total"], found["interval"]["error"]["total"]
  assert value == pytest.approx(np.mean(b - a))
  assert holds(interval, 0.05) and interval[0] > 0
  alone = [np.diff(bootstrap.intervals(x)["error"]["total"]) for x in (first, second)]
  assert np.diff(interval) < 0.3 * min(alone)
  # in another order, the same videos are the same pairs
  order = rng.permutation(len(b))
  mixed = row(b[order], prompts=[second.prompts[i] for i in order])
  assert bootstrap.difference(mixed, first)["interval"]["error"]["total"] == pytest.approx(interval)


@pytest.mark.slow
def test_a_pair_covers_the_true_difference():
  found = []
  for i in range(200):
    rng = np.random.default_rng(i)
    a = clustered(rng)
    b = a + np.tile(rng.normal(0.05, 0.1, PROMPTS), EACH) + rng.normal(0, 0.05, len(a))
    pair = bootstrap.difference(row(b), row(a), resamples=400)
    found.append(holds(pair["interval"]["error"]["total"], 0.05))
  assert 0.89 < np.mean(found) < 0.98


def test_rows_of_other_prompts_or_lengths_are_no_pair():
  values = np.ones(PROMPTS)
  other = [f"another {i}" for i in range(PROMPTS)]
  assert bootstrap.difference(row(values), row(values, prompts=other)) is None
  assert bootstrap.difference(row(values), row(values, frames=9)) is None
  assert bootstrap.difference(row(np.ones(2 * PROMPTS)), row(values)) is not None


def test_the_same_seed_draws_the_same_prompts():
  values = clustered(np.random.default_rng(0))
  a, b, other = (bootstrap.intervals(row(values), 200, seed=seed) for seed in (0, 0, 1))
  assert a == b and a["error"] != other["error"]
  assert bootstrap.draw(5, 3).sum(1).tolist() == [5] * 3


def test_what_was_never_judged_has_no_interval():
  nothing = np.zeros((PROMPTS, 5))
  one = row(np.ones(PROMPTS), colour=(nothing, nothing))
  assert bootstrap.means(one)["colour"] == {"total": None, "fifths": [None] * 5}
  assert bootstrap.intervals(one)["colour"] == {"total": None, "fifths": [None] * 5}
  assert bootstrap.means(one)["motion_ratio"]["total"] is None  # of no motion expected


def test_passages_are_resampled_as_shares_of_those_that_come_back():
  passages = [Passage(0, 0, 14), Passage(0, 1, 14), Passage(1, 1, 5), Passage(0, 0, 15), Passage(3)]
  one = dataclasses.replace(row(np.ones(5)), passages=tuple(passages), hidden=12)
  want = summarise(passages, 12)
  got = bootstrap.means(one)["passage"]
  assert got == pytest.approx({name: want[name] for name in got})
  assert set(got) == {"returned", "agree", "chance", "unseen", "early"}
  bounds = bootstrap.intervals(one)["passage"]
  assert all(holds(bounds[name], got[name]) for name in got)
  assert bounds["agree"][1] == 1 and 0 < bounds["returned"][0] < 0.8
  gone = dataclasses.replace(one, passages=(Passage(0), Passage(), *[Passage(2)] * 3))
  assert bootstrap.means(gone)["passage"]["agree"] is None
  assert bootstrap.intervals(gone)["passage"]["chance"] is None


@pytest.mark.parametrize(
  "world", [WorldConfig(), WorldConfig(size=32, frames=45, shape_size=0.375, pace=0.275, hidden=12)]
)
def test_the_means_are_those_of_measure(world):
  """Of true clips, some of them spoilt; every video for itself too."""
  videos, captions = shapes_truth.true_clips(world, clips=4, frames=world.frames)
  videos = videos.copy()
  videos[1, 5:] = videos[1, :1]
  videos[2, world.frames // 2 :] = 0
  want = shapes_truth.measure(videos, captions, world)
  one = rows.of_judged(
    shapes_truth.judge(videos, captions, world), name="a", kind="run", command="", config={}
  )
  got = bootstrap.means(one)

  def same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
      assert ours.keys() == theirs.keys()
      return all(same(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
      return all(map(same, ours, theirs))
    return ours == (theirs if isinstance(theirs, str | None) else pytest.approx(theirs, 1e-4, 1e-6))

  for name in (*bootstrap.PLAIN, "motion_ratio", "direction", "error_last_over_first", "drift"):
    assert same(got[name], want[name]), name
  assert same(bootstrap.of_each_video(one), want["prompts"])
  if world.hidden:
    assert got["passage"] == {name: want["passage"][name] for name in got["passage"]}
