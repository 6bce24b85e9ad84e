"""HiAR with FramePack's packed history on the shapes world: a block sees the window as usual, and
all older frames in a few tokens, in a past of one size.

    python -m hiar_jax.train --config=experiments/shapes_hiar_packed.py --workdir=runs/hiar_packed

The student alone is packed: its teacher, trajectories and critic are those of a plain run, so
`history.past = "ring"` and an empty `history.packing` make the run to compare it with, and
--config.stages_from shares data, teacher and trajectories.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  # five blocks: the last one has the window's, one by k2, and two in the tail
  c.data.frames = 15
  c.history.past = "packed"
  # 3 frames by k2 are 2 times 2 x 2 tokens, the mean of all older ones 2 x 2; of 4 x 4 a frame
  c.history.packing = "tc_f3k2f3k1_g3"
  return c
