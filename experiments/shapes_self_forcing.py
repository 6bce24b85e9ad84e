"""Self-Forcing (arXiv 2506.08009) on the shapes world: HiAR's stages, another method (method.py).

    python -m hiar_jax.train --config=experiments/shapes_self_forcing.py \
      --workdir=runs/self_forcing --config.stages_from=runs/shapes

The baseline of HiAR's paper.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  c.history.order = "block_first"  # each block to the end before the next
  c.history.level = "clean"
  c.distill.forward_kl.weight = 0.0
  return c
