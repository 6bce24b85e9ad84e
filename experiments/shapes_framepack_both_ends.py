"""FramePack's anti-drifting order on the shapes world: the first and the last section at once, then
the gap from its start, which sees where it has to arrive.

    python -m hiar_jax.train --config=experiments/shapes_framepack_both_ends.py \
      --workdir=runs/framepack_both_ends

A method to compare shapes_framepack.py with: --config.stages_from=runs/framepack takes data and
teacher from its run.
"""

from hiar_jax.experiments import shapes_framepack


def get_config(variant: str = "main"):
  c = shapes_framepack.get_config(variant)
  # the paper's Table 1, row "anti-drifting": one frame of what comes later, with frames left out
  c.framepack.packing = "td_f16k4f2k2f1k1_g9_x_f1k1"
  c.framepack.orders = ("both_ends",)
  c.sample.order = "both_ends"
  c.sample.length = 1.0  # an end as far away as those that it has learnt from
  return c
