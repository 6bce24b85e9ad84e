"""HiAR with a 14B student: the 1.3B run with another base, which is its own real score.

    python -m hiar_jax.train --config=experiments/hiar_wan_14b.py --workdir=runs/hiar_14b \
      --config.data.prompts=prompts.txt

Not a run of the paper.
"""

from hiar_jax.experiments import hiar_wan_1_3b


def get_config():
  c = hiar_wan_1_3b.get_config()
  c.model.update(hiar_wan_1_3b.SIZE_14B)
  c.weights.base = c.codec.weights = c.text.weights = "weights/wan_14b"
  c.weights.teacher = ""  # the base
  del c.teacher_model
  # weights, averages and moments of 14B take 79 GB a device when split over 8, 10 over 64
  c.mesh.update(data=1, fsdp=-1)
  return c
