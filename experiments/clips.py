"""HiAR on your own clips, on two CPU cores: three short films are enough to see it work.

    python -m hiar_jax.train --config=experiments/clips.py --workdir=runs/clips \
      --config.data.folder=clips

The folder holds `clip.mp4` beside `clip.txt`, or a metadata.jsonl. What is trained is small, and
remembers a few films more than it learns of the world; what to expect: docs/own_clips.md. It is
shapes.py with footage's sizes; another world's lessons are the comments there.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  c.data.update(source="videos", folder="clips", frames=9, size=(48, 64), fps=8.0, held_out=0.1)
  c.codec.update(channels=32, lapped=True)
  if variant == "main":
    c.teacher.update(steps=1000, batch=8)
    c.trajectories.update(count=96, batch=16)
    c.causal_init.update(steps=300, batch=8)
    c.distill.update(steps=120, batch=8, ema_start=10)
  c.sample.update(count=6, batch=6)
  return c
