"""Videos measured against the footage that a model was trained on, where no truth is known.

Each video is compared with the clips that have its prompt for a caption, or with all clips where
none has. None of this says whether a video is good: it says whether it moves, and stays, like the
footage.

- motion: mean change from frame to frame, as a share of the footage's. Well below 1: it freezes.
- still: share of frames that change by less than a tenth of the footage's mean change.
- jumps: share of frames that change by more than one and a half times the footage's largest change:
  a cut, or a break into another scene.
- distance: root mean square difference to the nearest frame of the footage, in levels of 255. It
  grows where a video drifts away from all that was shown. Of films that were learnt by heart it is
  small; of a large folder, of which a few hundred clips are looked at, only its change says much.
- sharpness, saturation, brightness, contrast: as shares of the footage's. Drift shows as a change
  over the video's fifths.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hiar_jax.evaluation import drift
from hiar_jax.video.frames import to_float

STILL = 0.1  # of the footage's mean change
JUMP = 1.5  # of its largest


def measure(
  videos: np.ndarray, prompts: Sequence[str], clips: Mapping[str, np.ndarray]
) -> dict[str, object]:
  """Returns the measures of videos uint8 [n F H W 3], as JSON values.

  prompts: of the videos. clips: caption -> clips of the footage uint8 [m f H W 3], two frames each
  at least.

  Means are over videos; `fifths` are of the video's length. Raises UserError for videos of fewer
  frames than drift.SEGMENTS.
  """
  of_footage = {caption: _Footage(x) for caption, x in clips.items()}
  everything = None
  rows = []
  for video, prompt in zip(videos, prompts, strict=True):
    footage = of_footage.get(prompt)
    if footage is None:
      everything = everything or _Footage(np.concatenate(list(clips.values())))
      footage = everything
    rows.append(_of_video(video, footage))
  total = {name: float(np.mean([row[name] for row in rows])) for name in ("still", "jumps")}
  for name in ("motion", "distance", *METRICS):
    fifths = np.mean([row[name] for row in rows], axis=0)
    total[name] = {"total": float(fifths.mean()), "fifths": fifths.tolist()}
  first, *_, last = total["distance"]["fifths"]
  total["distance_last_over_first"] = last / first if first else None
  return {
    **total,
    "drift": drift.measure(videos),
    "prompts": list(prompts),
    "frames": videos.shape[1],
    "clips": sum(len(x) for x in clips.values()),
  }


def line(result: Mapping) -> str:
  """Returns the main figures of `measure` in one line."""
  shares = ", ".join(
    f"{name} {result[name]['total']:.2f} ({result[name]['fifths'][-1]:.2f} in the last fifth)"
    for name in ("motion", "sharpness", "contrast")
  )
  return (
    f"over {result['frames']} frames, as shares of the footage's: {shares}; frames that stand "
    f"still {result['still']:.1%}, jumps {result['jumps']:.1%}; to the nearest frame of the "
    f"footage {result['distance']['total']:.1f} levels of 255"
  )


def brightness(frames) -> np.ndarray:
  """Mean of each frame's luma, in [0, 1]: [..., f, H, W, 3] -> [..., f]."""
  return drift.luma(frames).mean((-2, -1)) / 255


def contrast(frames) -> np.ndarray:
  """Standard deviation of each frame's luma, in [0, 1]: [..., f, H, W, 3] -> [..., f]."""
  return drift.luma(frames).std((-2, -1)) / 255


METRICS = {
  "sharpness": drift.sharpness,
  "saturation": drift.saturation,
  "brightness": brightness,
  "contrast": contrast,
}
_LEAST = 1e-6  # of a black or still footage, by which nothing is divided


class _Footage:
  """What a video is compared with: clips uint8 [m f H W 3]."""

  def __init__(self, clips: np.ndarray):
    changes = np.stack([drift.frame_difference(clip)[1:] for clip in clips])
    self.change, self.largest = float(changes.mean()), float(changes.max())
    self.means = {
      name: float(np.mean([metric(clip).mean() for clip in clips]))
      for name, metric in METRICS.items()
    }
    # [k, H W 3] and their squared norms: distances are then one product of matrices
    self._frames = clips.reshape(clips.shape[0] * clips.shape[1], -1).astype(np.float32)
    self._norms = np.einsum("kx,kx->k", self._frames, self._frames)

  def distance(self, video: np.ndarray) -> np.ndarray:
    """Returns the distance [F] of each frame to the nearest of the footage."""
    found = []
    for frame in video.reshape(len(video), -1).astype(np.float32):
      squared = self._norms - 2 * (self._frames @ frame) + frame @ frame
      found.append(np.sqrt(max(float(squared.min()), 0.0) / frame.size))
    return np.asarray(found)


def _of_video(video: np.ndarray, footage: _Footage) -> dict[str, object]:
  """Returns shares, and values [5] of the video's fifths."""
  parts = drift.segments(len(video))
  change = drift.frame_difference(video)
  made: dict[str, object] = {
    "still": float((change[1:] < STILL * footage.change).mean()),
    "jumps": float((change[1:] > JUMP * footage.largest).mean()),
    "motion": _fifths(change, parts) / max(footage.change, _LEAST),
    "distance": _fifths(footage.distance(video), parts),
  }
  for name, metric in METRICS.items():
    made[name] = _fifths(metric(to_float(video)), parts) / max(footage.means[name], _LEAST)
  return made


def _fifths(values: np.ndarray, parts: Sequence[slice]) -> np.ndarray:
  return np.asarray([np.nanmean(values[part]) for part in parts])
