"""Self-Aligned Forcing with Wan2.1-T2V-1.3B: context at the input level, differentiable, with a
clean sink.

    python -m hiar_jax.train --config=experiments/self_aligned_wan_1_3b.py \
      --workdir=runs/self_aligned --config.data.prompts=prompts.txt

A method to compare HiAR with.
"""

from hiar_jax.experiments import hiar_wan_1_3b


def get_config():
  c = hiar_wan_1_3b.get_config()
  c.history.level = "input"  # t_c = t_s
  c.history.gradient = "attached"
  c.history.window = 12  # published recipe, as all below
  c.history.sink = 3
  c.history.sink_level = "clean"
  c.distill.steps = 800
  c.distill.batch = 32
  c.mesh.sequence = 2  # a clip on two devices, so that 32 fill 64; 1 on 32 devices
  c.distill.critic_lr = 4e-7
  c.distill.forward_kl.weight = 0.0
  return c
