"""Self-Aligned Forcing (2026) on the shapes world: context at the input level, differentiable, with
a clean sink.

    python -m hiar_jax.train --config=experiments/shapes_self_aligned.py \
      --workdir=runs/self_aligned --config.stages_from=runs/shapes

A method to compare HiAR with.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  c.history.level = "input"
  c.history.gradient = "attached"
  c.history.window = 9  # the sink and three frames more than the block's own
  c.history.sink = 3  # SAF: one block of three frames
  c.history.sink_level = "clean"
  c.distill.forward_kl.weight = 0.0
  return c
