"""Drift of a long video, by image statistics that need no network.

The video is split evenly into five segments in time; a line is fitted to a metric's means per
segment, and its slope is the drift (HiAR, arXiv 2603.08703, section 4: HSV saturation, Laplacian
variance and temporal coherence are among its metrics; it does not publish how slopes are weighted
into one score, so the raw slopes are reported). FramePack's start-end contrast (arXiv 2504.12626,
Eq. 7) is reported too: |M(first 15 % of the frames) - M(last 15 %)|.
"""

import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float

SEGMENTS = 5
START_END = 0.15  # FramePack Eq. 7


def saturation(frames) -> np.ndarray:
  """Mean HSV saturation (max - min) / max per frame, in [0, 1]: [..., f, H, W, 3] -> [..., f]."""
  rgb = _unit(frames)
  top, bottom = rgb.max(-1), rgb.min(-1)
  # Black has no saturation: 0, without a division by zero.
  return np.where(top > 0, (top - bottom) / np.maximum(top, 1e-6), 0.0).mean((-2, -1))


def sharpness(frames) -> np.ndarray:
  """Variance of the 4-neighbour Laplacian of each frame's luma (0..255): [..., f, H, W, 3] ->
  [..., f].
  """
  # mirrored borders, as OpenCV's Laplacian has by default
  grey = luma(frames)
  padded = np.pad(grey, [(0, 0)] * (grey.ndim - 2) + [(1, 1), (1, 1)], mode="reflect")
  neighbours = (
    padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
  )
  return (neighbours - 4.0 * grey).var((-2, -1))


def luma(frames) -> np.ndarray:
  """Rec. 601 luma in [0, 255], as OpenCV's cvtColor: [..., H, W, 3] -> [..., H, W]."""
  return 255.0 * (_unit(frames) @ np.asarray([0.299, 0.587, 0.114], np.float32))


def frame_difference(frames) -> np.ndarray:
  """Mean absolute difference to the previous frame, in [0, 1]: [..., f, H, W, 3] -> [..., f]; frame
  0 is nan.
  """
  rgb = _unit(frames)
  change = np.abs(np.diff(rgb, axis=-4)).mean((-3, -2, -1))
  return np.concatenate([np.full_like(change[..., :1], np.nan), change], -1)


METRICS = {"saturation": saturation, "sharpness": sharpness, "frame_difference": frame_difference}


def segments(frames: int, count: int = SEGMENTS) -> list[slice]:
  """Returns `count` nearly equal slices of `frames` frames, in order.

  Raises:
    UserError: fewer frames than slices.
  """
  if frames < count:
    raise UserError(
      f"the video has {frames} frames; measuring per {count} segments needs at least {count}"
    )
  edges = np.linspace(0, frames, count + 1).round().astype(int)
  return [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def trend(values: np.ndarray) -> dict:
  """Fits the change of a metric of videos, [n, f], along the frames.

  Returns:
    segments: five means. mean: over all frames. slope: of the least-squares line through the
    segments, per segment. relative_slope: slope / mean. start_end: FramePack Eq. 7, the mean over
    videos of each video's contrast.
  """
  means = [mean(values[..., part]) or 0.0 for part in segments(values.shape[-1])]
  slope = float(np.polyfit(np.arange(len(means)), means, 1)[0])
  total = mean(values) or 0.0
  return {
    "segments": means,
    "mean": total,
    "slope": slope,
    "relative_slope": slope / total if total else 0.0,
    "start_end": float(contrast(values).mean()),
  }


def contrast(values: np.ndarray) -> np.ndarray:
  """Returns FramePack's start-end contrast (Eq. 7) of each video, [n], of a metric [n, f]."""
  known = values[:, np.isfinite(values).all(0)]  # frame_difference has no value at frame 0
  ends = max(1, round(START_END * known.shape[1]))
  return np.abs(known[:, :ends].mean(1) - known[:, -ends:].mean(1))


def measure(videos) -> dict[str, dict]:
  """Returns {metric: `trend`} of videos [n, f, H, W, 3] (uint8, or float in [-1, 1]); JSON values.

  Raises:
    UserError: another shape, or fewer than SEGMENTS frames.
  """
  return {name: trend(values) for name, values in per_frame(videos).items()}


def per_frame(videos) -> dict[str, np.ndarray]:
  """Returns {metric: values [n, f]} of videos as in `measure`. Raises UserError as there."""
  videos = to_float(videos)
  if videos.ndim != 5 or videos.shape[-1] != 3:
    raise UserError(f"videos have shape {videos.shape}; expected [n, f, H, W, 3]")
  # Video by video: a metric's temporaries are several times the size of its input.
  return {name: np.stack([metric(video) for video in videos]) for name, metric in METRICS.items()}


def _unit(frames) -> np.ndarray:
  """Maps uint8, or float in [-1, 1], to float in [0, 1]."""
  return np.clip((to_float(frames) + 1.0) / 2.0, 0.0, 1.0)


def mean(values: np.ndarray) -> float | None:
  """Returns the mean of what is not nan, None where all is."""
  kept = values[~np.isnan(values)]
  return float(kept.mean()) if kept.size else None
