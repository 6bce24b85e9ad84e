"""HiAR without the forward-KL term on the shapes world: the ablation of its Table 3.

    python -m hiar_jax.train --config=experiments/shapes_no_forward_kl.py \
      --workdir=runs/no_forward_kl --config.stages_from=runs/shapes

The paper reports less drift and a loss of motion.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  c.distill.forward_kl.weight = 0.0
  return c
