"""Means of a row's videos with intervals, and paired differences of two rows: a bootstrap over
prompts.

Videos of one prompt are not independent of each other, so prompts are drawn, with replacement, and
all videos of a prompt come with it, as often as it is drawn (the percentile bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993). All metrics are sums over videos divided by
such sums, or ratios of these: a resample adds the sums up anew, so that the interval is of the
number in the table, not of a mean of ratios. Two rows with the same prompts are resampled by the
same draws: what a hard prompt costs both is no part of their difference.

With few prompts a percentile interval is a little narrow: of 27, the world's held-out ones, it
holds the true mean in about 93 of 100 cases, not 95 (tests/evaluation/test_bootstrap.py).
"""

from typing import Any

import numpy as np

from hiar_jax.data.shapes_world import COLOURS
from hiar_jax.evaluation import drift
from hiar_jax.evaluation.rows import FIFTHS, WHOLE, Row

RESAMPLES = 10_000
LEVEL = 95  # percent of the resamples that lie within an interval
PLAIN = ("recognised", "colour", "shape", "background", "hidden", "motion", "jumps", "error")

Tree = dict[str, Any]  # {metric: {"total": x, "fifths": [x x x x x]} or x}, as shapes_truth.measure


def draw(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
  """Returns how often each prompt is drawn, int [resamples, prompts]."""
  rng = np.random.default_rng(seed)
  return rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples)


def means(row: Row) -> Tree:
  """Returns the row's metrics as shapes_truth.measure has them."""
  return _each(statistics(row, np.ones((1, len(row.prompts)))), lambda x: _number(x[0]))


def of_each_video(row: Row) -> list[Tree]:
  """Returns the total of each metric for each video."""
  each = statistics(row, np.eye(len(row.prompts)))
  totals = {name: x["total"] for name, x in each.items() if "total" in x}
  totals["error_last_over_first"] = each["error_last_over_first"]
  return [
    {"prompt": prompt, **{name: _number(x[i]) for name, x in totals.items()}}
    for i, prompt in enumerate(row.prompts)
  ]


def intervals(row: Row, resamples: int = RESAMPLES, seed: int = 0) -> Tree:
  """Returns [low, high] for each number of `means`; None where there is none."""
  return _each(statistics(row, _weights(row, resamples, seed)), _interval)


def difference(
  row: Row, reference: Row, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Tree] | None:
  """Returns {"value", "interval"} of row - reference.

  None where they are not videos of one length for the same prompts.
  """
  same = set(row.prompts) == set(reference.prompts)
  if not same or row.settings["frames"] != reference.settings["frames"]:
    return None
  sides = [
    (
      statistics(each, np.ones((1, len(each.prompts)))),
      statistics(each, _weights(each, resamples, seed)),
    )
    for each in (row, reference)
  ]
  value, drawn = (_minus(a, b) for a, b in zip(*sides, strict=True))
  return {"value": _each(value, lambda x: _number(x[0])), "interval": _each(drawn, _interval)}


def statistics(row: Row, weights: np.ndarray) -> Tree:
  """Returns every metric of the row's videos, each counted weights [r, n] times: arrays [r] or
  [r, 5], nan where nothing was judged.
  """
  sums = {name: weights @ x for name, x in row.sums.items()}
  counts = {name: weights @ x for name, x in row.counts.items()}
  mean = {
    name: {
      "total": _ratio(sums[name].sum(-1), counts[name].sum(-1)),
      "fifths": _ratio(sums[name], counts[name]),
    }
    for name in FIFTHS
  }
  found: Tree = {name: mean[name] for name in PLAIN}
  found["motion_ratio"] = {
    part: _ratio(mean["motion"][part], mean["expected_motion"][part]) for part in mean["motion"]
  }
  whole = {name: _ratio(sums[name], counts[name])[:, 0] for name in WHOLE}
  found["direction"] = {"total": whole["direction"]}
  error = mean["error"]["fifths"]
  found["error_last_over_first"] = _ratio(error[:, -1], error[:, 0])
  found["drift"] = {}
  for name in drift.METRICS:
    segments, total = mean[name]["fifths"], mean[name]["total"]
    at = np.arange(segments.shape[-1]) - (segments.shape[-1] - 1) / 2
    slope = segments @ at / (at @ at)  # of the least-squares line
    found["drift"][name] = {
      "segments": segments,
      "mean": total,
      "slope": slope,
      "relative_slope": _ratio(slope, total),
      "start_end": whole[f"{name}_start_end"],
    }
  if row.passages is not None:
    found["passage"] = _passage(row, weights)
  return found


def _passage(row: Row, weights: np.ndarray) -> Tree:
  """Returns the shares of shapes_passage.summarise, [r] each."""
  found = [(p.before, p.after, p.unseen) for p in row.passages]
  before, after, unseen = np.asarray(found, float).T  # nan for None
  back = ~np.isnan(after)
  returned = weights @ back
  # of those that come back, the share of each colour, [r, colours]
  colours = [
    _ratio(weights @ (back[:, None] & (x[:, None] == np.arange(len(COLOURS)))), returned[:, None])
    for x in (before, after)
  ]
  return {
    "returned": _ratio(returned, weights.sum(-1)),
    "agree": _ratio(weights @ (back & (before == after)), returned),
    "chance": (colours[0] * colours[1]).sum(-1),
    "unseen": _ratio(weights @ np.where(back, unseen, 0), returned),
    "early": _ratio(weights @ (back & (unseen < row.hidden)), returned),
  }


def _weights(row: Row, resamples: int, seed: int) -> np.ndarray:
  """Returns how often each video is drawn, [resamples, n]."""
  prompts, which = np.unique(row.prompts, return_inverse=True)
  # as floats: products of integers with them would be converted each time, and are ten times slower
  return draw(len(prompts), resamples, seed)[:, which].astype(float)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
  return np.divide(a, b, out=np.full(a.shape, np.nan), where=~((b == 0) | np.isnan(b)))


def _interval(draws: np.ndarray) -> list | None:
  """Returns [low, high] of draws [r]; of [r, 5] a list of five."""
  if draws.ndim > 1:
    return [_interval(column) for column in draws.T]
  known = draws[~np.isnan(draws)]
  tail = (100 - LEVEL) / 2
  return np.percentile(known, (tail, 100 - tail)).tolist() if known.size else None


def _number(value) -> float | list | None:
  """Returns a JSON value, None for nan."""
  if np.ndim(value):
    return [_number(x) for x in value]
  return None if np.isnan(value) else float(value)


def _each(tree, function):
  if isinstance(tree, dict):
    return {name: _each(branch, function) for name, branch in tree.items()}
  return function(tree)


def _minus(a, b):
  if isinstance(a, dict):
    return {name: _minus(a[name], b[name]) for name in a if name in b}
  return a - b
