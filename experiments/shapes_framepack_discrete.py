"""FramePack with discretised history (+D) on the shapes world: what a section reads of the past is
replaced by the nearest of a few centroids of clean latents, so that errors are not handed on.

    python -m hiar_jax.train --config=experiments/shapes_framepack_discrete.py \\
      --workdir=runs/framepack_discrete

A method to compare shapes_framepack.py with: --config.stages_from=runs/framepack takes data and
teacher from its run.
"""

from ml_collections import config_dict

from hiar_jax.experiments import shapes_framepack


def get_config(variant: str = "main") -> config_dict.ConfigDict:
  c = shapes_framepack.get_config(variant)
  c.framepack.packing = f"{shapes_framepack.PACKING}+D"  # the paper's Table 1
  c.framepack.codebook = config_dict.ConfigDict(
    dict(
      centroids=256,  # the paper's Table 2; its text says that 128 already drift much less
      unit=1,  # one latent pixel, of all channels
      per_centroid=256,  # latent pixels that are fitted on, and below: faiss's defaults
      iterations=25,
    )
  )
  c.sample.discretised = True  # as in training
  return c
