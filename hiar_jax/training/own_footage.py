"""A run's videos beside the footage that it was trained on: motion, drift, and what the codec
loses, where no truth is known (evaluation.footage).
"""

from collections.abc import Sequence

import numpy as np

from hiar_jax.data import pipeline, tfds_builder
from hiar_jax.evaluation import drift, footage
from hiar_jax.training import prepared_data
from hiar_jax.training.run import Run

CLIPS = 256  # of the footage that are looked at, spread over those of the videos' captions


def measure(run: Run, videos: np.ndarray, prompts: Sequence[str]) -> dict[str, object]:
  """Returns the measures of videos uint8 [n F H W 3] and of the codec, as JSON values; {} where the
  data holds no pixels, or videos or clips are too short to tell.
  """
  e = run.experiment
  short = videos.shape[1] < drift.SEGMENTS or e.data.frames < 2
  if run.source.captions_only or e.stores_latents or short:
    return {}
  return {**footage.measure(videos, prompts, clips_of(run, prompts)), "codec": codec_error(run)}


def clips_of(run: Run, prompts: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns caption -> clips uint8 [m F H W 3] of the data: of the prompts' captions, or, where
  some prompt is no caption, of all.
  """
  directory = run.directory("data")
  captions = pipeline.read_captions(directory)
  wanted = set(prompts) if set(prompts) <= set(captions) else set(captions)
  rows = [i for i, caption in enumerate(captions) if caption in wanted]
  source = tfds_builder.open_source(directory)
  found: dict[str, list[np.ndarray]] = {}
  for i in pipeline.spread(rows, CLIPS):
    found.setdefault(captions[i], []).append(pipeline.window(source[i], 0)["video"])
  return {caption: np.stack(clips) for caption, clips in found.items()}


def codec_error(run: Run) -> dict[str, object]:
  """Returns what the codec loses of held-out clips, or of those that it is fitted on: the mean
  square error of pixels in [0, 1], and its PSNR in dB.
  """
  held_out = prepared_data.held_out(run, CLIPS)
  clips = held_out["video"] if held_out else prepared_data.videos_to_fit(run)[:CLIPS]
  squares = [
    np.square(run.pixels(run.autoencoder.latents(clip[None]))[0] / 255.0 - clip / 255.0).mean()
    for clip in clips
  ]
  error = float(np.mean(squares))
  psnr = -10 * float(np.log10(error)) if error else None
  return {"clips": "held out" if held_out else "fitted on", "error": error, "psnr": psnr}
