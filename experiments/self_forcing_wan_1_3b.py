"""Self-Forcing (arXiv 2506.08009) with Wan2.1-T2V-1.3B: block-first, clean context, no forward-KL.

    python -m hiar_jax.train --config=experiments/self_forcing_wan_1_3b.py \
      --workdir=runs/self_forcing --config.data.prompts=prompts.txt

The baseline of HiAR's paper.
"""

from hiar_jax.experiments import hiar_wan_1_3b


def get_config():
  c = hiar_wan_1_3b.get_config()
  c.history.order = "block_first"  # section 3.2
  c.history.level = "clean"
  c.distill.critic_lr = 4e-7  # configs/self_forcing_dmd.yaml
  c.distill.forward_kl.weight = 0.0
  return c
