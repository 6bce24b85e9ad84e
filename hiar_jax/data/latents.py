"""Clips as latents: encoded once, for codecs that are too slow for the training loop.

A record is {latents [f h w c], start int32 [], caption}; `start` is in frames of the video, as that
of a clip (data.parts).
"""

from collections.abc import Callable, Mapping
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from hiar_jax.data.parts import PartWriter
from hiar_jax.progress import Progress
from hiar_jax.types import DTYPES, Video

PART_BYTES = 64 << 20  # of latents that a stopped run encodes again, at most


class LatentWriter(PartWriter):
  """Collects the latents of `total` clips."""

  key = "latents"
  kind = "latents"
  dtypes = DTYPES
  not_finite = "check the autoencoder's weights"


def recipe_of(source: Any, codec: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Returns what the latents of a source's clips depend on; arguments as `prepare`."""
  # how films are cut for data sets of pixels is of no account here
  made_from = {name: value for name, value in source.recipe.items() if name != "cut"}
  kinds = {"clips": made_from["kind"], "kind": LatentWriter.kind}
  return {**made_from, **kinds, **codec, "dtype": dtype}


def prepare(
  directory: str | os.PathLike,
  source: Any,
  encode: Callable[[np.ndarray], Video],
  shape: tuple[int, int, int, int],
  *,
  dtype: str,
  codec: Mapping[str, Any],
) -> None:
  """Writes the data set of a source's clips; does nothing if it is complete.

  Goes on with the first part that a stopped run has not finished.

  source: a data.sources.Source. encode: clips uint8 [1 F H W 3] -> latents [1 f h w c]. shape: of a
  clip's latents. dtype: of the stored ones. codec: identity and settings of the codec, as JSON
  values.

  Raises:
    UserError: no clips, latents that are not finite, or the directory holds those of other clips or
      of another codec.
  """
  recipe = recipe_of(source, codec, dtype)
  if source.is_made(directory, recipe):
    return
  found = source.find()
  part_size = max(1, PART_BYTES // (int(np.prod(shape)) * jnp.dtype(dtype).itemsize))
  writer = LatentWriter(directory, found.count, part_size, dtype, recipe={**recipe, **found.recipe})
  missing = writer.missing_parts()
  done = found.count - sum(len(writer.rows(part)) for part in missing)
  with Progress("latents", found.count, initial=done) as bar:
    clips, at = None, None
    for part in missing:
      rows = writer.rows(part)
      if rows.start != at:  # the parts between are there: their clips are not decoded again
        clips = found.read(rows.start)
      latents, captions, starts = [], [], []
      for _, clip in zip(rows, clips, strict=False):
        latents.append(np.asarray(encode(clip["video"][None]))[0])
        captions.append(clip["caption"])
        starts.append(clip["start"])
        done += 1
        bar.update(done)
      writer.write_part(part, np.stack(latents), captions, starts)
      at = rows.stop
  writer.finish()
