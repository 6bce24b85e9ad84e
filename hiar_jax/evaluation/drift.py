"""Drift of a long video by numbers that need no network: what changes from its first fifth to its
last.

The video is split evenly into five segments in time; a metric's value per segment is fitted by a
line, whose slope is its drift (HiAR, arXiv 2603.08703, section 4: HSV saturation, Laplacian
variance and temporal coherence are among its metrics; it does not publish how slopes are weighed
into one score, so the raw slopes are reported). Beside it stands FramePack's start-end contrast
(arXiv 2504.12626, Eq. 7): |M(first 15 % of the frames) - M(last 15 %)|.
"""

from collections.abc import Mapping

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float

SEGMENTS = 5
START_END = 0.15  # FramePack Eq. 7


def saturation(frames) -> np.ndarray:
  """Mean HSV saturation (max - min) / max of each frame, in [0, 1]; frames [..., f, H, W, 3] ->
  [..., f].
  """
  rgb = _unit(frames)
  top, bottom = rgb.max(-1), rgb.min(-1)
  return np.where(top > 0, (top - bottom) / np.maximum(top, 1e-6), 0.0).mean((-2, -1))


def sharpness(frames) -> np.ndarray:
  """Variance of the Laplacian (4 neighbours) of each frame's luma (0..255): [..., f, H, W, 3] ->
  [..., f].
  """
  luma = 255.0 * (_unit(frames) @ np.asarray([0.299, 0.587, 0.114], np.float32))
  padded = np.pad(luma, [(0, 0)] * (luma.ndim - 2) + [(1, 1), (1, 1)], mode="reflect")
  neighbours = (
    padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
  )
  return (neighbours - 4.0 * luma).var((-2, -1))


def frame_difference(frames) -> np.ndarray:
  """Mean absolute change, in [0, 1], of each frame against the one before: [..., f, H, W, 3] ->
  [..., f], nan first.
  """
  rgb = _unit(frames)
  change = np.abs(np.diff(rgb, axis=-4)).mean((-3, -2, -1))
  return np.concatenate([np.full_like(change[..., :1], np.nan), change], -1)


METRICS = {"saturation": saturation, "sharpness": sharpness, "frame_difference": frame_difference}


def segments(frames: int, count: int = SEGMENTS) -> list[slice]:
  """`count` nearly equal slices of `frames` frames, in order.

  Raises UserError for fewer frames than slices.
  """
  if frames < count:
    raise UserError(
      f"the video has {frames} frames; measuring per {count} segments needs at least {count}"
    )
  edges = np.linspace(0, frames, count + 1).round().astype(int)
  return [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def per_segment(values: np.ndarray, count: int = SEGMENTS) -> list[float]:
  """Mean of a metric [..., f] over each segment of its last axis and everything before it; nan
  entries are left out.
  """
  return [_mean(values[..., part]) for part in segments(values.shape[-1], count)]


def trend(values: np.ndarray) -> dict:
  """How a metric of videos [n, f] changes along them.

  Returns segments (five means), slope (of their least-squares line, per segment), relative_slope
  (slope / mean), and start_end (FramePack Eq. 7, a mean over videos of each video's contrast).
  """
  means = per_segment(values)
  slope = float(np.polyfit(np.arange(len(means)), means, 1)[0])
  known = values[:, np.isfinite(values).all(0)]  # a metric of differences has no value at frame 0
  ends = max(1, round(START_END * known.shape[1]))
  start, end = known[:, :ends].mean(1), known[:, -ends:].mean(1)
  total = _mean(values)
  return {
    "segments": means,
    "mean": total,
    "slope": slope,
    "relative_slope": slope / total if total else 0.0,
    "start_end": float(np.abs(start - end).mean()),
  }


def measure(videos) -> dict[str, dict]:
  """Drift of videos [n, f, H, W, 3] (uint8, or float in [-1, 1]): metric name -> `trend`.

  JSON-serialisable.
  """
  videos = to_float(videos)
  if videos.ndim != 5 or videos.shape[-1] != 3:
    raise UserError(f"videos have shape {videos.shape}; expected [n, f, H, W, 3]")
  per_frame = {
    name: np.stack([metric(video) for video in videos]) for name, metric in METRICS.items()
  }
  return {name: trend(values) for name, values in per_frame.items()}


def format_table(results: Mapping[str, Mapping[str, dict]]) -> str:
  """A markdown table of `measure`'s results: one row a method, slope and start-end contrast of each
  metric.
  """
  names = list(METRICS)
  header = ["method"] + [f"{name} {kind}" for name in names for kind in ("slope", "start-end")]
  lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
  for method, result in results.items():
    cells = [f"{result[name][kind]:.4g}" for name in names for kind in ("slope", "start_end")]
    lines.append("| " + " | ".join([method] + cells) + " |")
  return "\n".join(lines)


def _unit(frames) -> np.ndarray:
  return np.clip((to_float(frames) + 1.0) / 2.0, 0.0, 1.0)


def _mean(values: np.ndarray) -> float:
  kept = values[~np.isnan(values)]
  return float(kept.mean()) if kept.size else 0.0
