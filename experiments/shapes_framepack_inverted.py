"""FramePack's inverted order on the shapes world: from the last section to the first, towards a
first frame that is real, so that each section sees what it has to come from (image to video).

    python -m hiar_jax.train --config=experiments/shapes_framepack_inverted.py \
      --workdir=runs/framepack_inverted

A method to compare shapes_framepack.py with. It makes data of its own, whose clips have one frame
more: the given one.
"""

from hiar_jax.experiments import shapes_framepack


def get_config(variant: str = "main"):
  c = shapes_framepack.get_config(variant)
  # the paper's Table 1, row "inverted": the history lies behind the section
  c.framepack.packing = "f1k1_x_g9_f1k1f2k2f16k4_td"
  c.framepack.orders = ("inverted",)
  c.framepack.given = 1
  c.data.frames = 46  # the first frame and five sections
  # counted on from the first frame with at most three sections left out: of a video of any length a
  # section has one of four places, all of which clips of five sections have
  c.framepack.published = True
  c.sample.order = "inverted"
  return c
