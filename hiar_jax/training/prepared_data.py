"""The data set of a run, and as much of it as a codec or a codebook is fitted on."""

from collections.abc import Sequence
import sys

import numpy as np

from hiar_jax.config.workdir import to_json
from hiar_jax.data import latents, pipeline, tfds_builder, video_folder
from hiar_jax.training.run import Run

CLIPS = 1024  # a few million patches: with more, the components no longer change
BYTES = 1 << 30  # of what is read of them


def prepare(run: Run) -> None:
  """Writes <workdir>/data, in one process: clips and the codec fitted on them; clips as latents, of
  a published codec; or encoded prompts alone.
  """
  e, directory = run.experiment, run.directory("data")
  made = tfds_builder.is_complete(directory)
  if e.stores_latents:
    _prepare_latents(run)
  elif not run.borrows("data"):
    run.source.prepare(directory, lambda: run.text_encoder)
    e.text.fit(directory, run.words())
    e.codec.fit(directory, lambda: videos_to_fit(run))
  if not made and not run.borrows("data"):
    print_unread(run, run.source.captions(directory))


def print_unread(run: Run, captions: Sequence[str]) -> None:
  """Prints one line on captions of which the text encoder does not read all."""
  unread = {x: said[0] for x in set(captions) if (said := run.text_encoder.warnings(x))}
  among = [caption for caption in captions if caption in unread]
  if among:
    print(
      f"data: {len(among)} of {len(captions)} captions are not read whole "
      f"(--config.text.length is {run.experiment.text.length}); the first: {unread[among[0]]}",
      file=sys.stderr,
    )


def _prepare_latents(run: Run) -> None:
  e, directory = run.experiment, run.directory("data")
  # what latents depend on beside the clips; the directory of weights may be moved: what is in them
  # is what counts
  settings = {f"codec_{k}": v for k, v in to_json(e.codec).items() if k != "weights"}
  codec, dtype = {"codec": run.autoencoder.identity, **settings}, e.data.latent_dtype
  if run.borrows("data"):
    recipe = latents.recipe_of(run.source, codec, dtype)
    tfds_builder.check_recipe(directory, recipe, ignore=tfds_builder.OF_PARTS)
    return
  latents.prepare(
    directory, run.source, run.autoencoder.latents, e.latent.clip, dtype=dtype, codec=codec
  )
  e.text.fit(directory, run.words())
  run.text_encoder.prepare([*pipeline.read_captions(directory), run.text_encoder.negative_prompt])


def videos_to_fit(run: Run) -> np.ndarray:
  """Returns clips of the data, uint8 [n F H W 3], evenly spread over it, as many as BYTES hold; of
  a piece of film, a window drawn by the run's seed.
  """
  source = tfds_builder.open_source(run.directory("data"))
  rows = pipeline.spread(range(len(source)), min(CLIPS, max(1, BYTES // source[0]["video"].nbytes)))
  if run.source.world is not None:  # whose clips are drawn alike: any will do, as recorded
    rows = range(len(rows))
  draws = np.random.default_rng(run.experiment.seed).integers(pipeline.DRAWS, size=len(source))
  return np.stack([pipeline.window(source[i], draws[i])["video"] for i in rows])


def held_out(run: Run, count: int) -> dict[str, np.ndarray]:
  """Returns up to `count` held-out clips (data.held_out), evenly spread over them: video uint8
  [n F H W 3], start and caption [n]; {} where there are none.
  """
  directory = run.directory("data") / video_folder.HELD_OUT
  if not tfds_builder.is_complete(directory):
    return {}
  source = tfds_builder.open_source(directory)
  clips = [source[i] for i in pipeline.spread(range(len(source)), count)]
  captions = np.asarray([clip["caption"].decode() for clip in clips])
  return {
    "video": np.stack([clip["video"] for clip in clips]),
    "start": np.asarray([clip["start"] for clip in clips], np.int32),
    "caption": captions,
  }


def spread_latents(directory) -> np.ndarray:
  """Returns latents of clips of the data, float32 [n f h w c], evenly spread over it."""
  source = tfds_builder.open_source(directory, ("latents",))
  count = max(1, min(len(source), CLIPS, BYTES // (4 * source[0]["latents"].size)))
  rows = pipeline.spread(range(len(source)), count)
  return np.stack([source[i]["latents"] for i in rows]).astype(np.float32)
