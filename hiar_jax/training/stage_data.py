"""Stage 1: the data set (the shapes world, a folder of videos, or encoded prompts) and the codec
fitted on its videos.
"""

import jax
from jax.experimental import multihost_utils
import numpy as np

from hiar_jax.components import patch_pca
from hiar_jax.components.wan import save_codec
from hiar_jax.data import pipeline, prompt_texts, shapes_clips, tfds_builder, video_folder
from hiar_jax.training.run import CODEC, Run

FIT_CLIPS = 1024  # a few million patches: the components no longer change


def run(run: Run) -> None:
  """Writes <workdir>/data. Only process 0 writes; the others wait."""
  directory, data = run.directory("data"), run.experiment.data
  if jax.process_index() == 0 and not run.experiment.stages_from:
    if data.source == "shapes":
      shapes_clips.prepare(directory, run.world, data.clips, data.seed)
    elif data.source == "videos":
      video_folder.prepare(directory, data.folder, data.frames, data.height, data.width, data.fps)
    else:
      run.medium.prepare(pipeline.read_prompts(data.prompts))
      prompt_texts.prepare(directory, data.prompts, run.medium.texts)
    if data.source != "prompts" and not (directory / CODEC).exists():
      save_codec(directory / CODEC, _fit(run))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("data")


def _fit(run: Run) -> patch_pca.PatchCodec:
  source = tfds_builder.open_source(run.directory("data"))
  clips = np.stack([source[i]["video"] for i in range(min(len(source), FIT_CLIPS))])
  return patch_pca.fit(clips.astype(np.float32) / 127.5 - 1.0, run.experiment.codec)
