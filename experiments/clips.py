"""HiAR on your own clips, on two CPU cores: three short films are enough to see it work.

    python -m hiar_jax.train --config=experiments/clips.py --workdir=runs/clips \
      --config.data.folder=clips

The folder holds `clip.mp4` beside `clip.txt`, or a metadata.jsonl. So small a model, of so few
films, remembers them more than it learns of the world; what to expect, and what to change for more:
docs/own_clips.md. The method and the network are shapes.py's, whose comments say why.
"""

from hiar_jax.experiments import shapes


def get_config(variant: str = "main"):
  c = shapes.get_config(variant)
  c.data.update(
    source="videos",
    folder="clips",
    frames=9,
    size=(48, 64),  # 6 x 8 patches a frame: three times the tokens of shapes.py
    fps=8.0,
    # the end of each film: the teacher logs its loss there, and the codec is measured on it
    held_out=0.1,
  )
  # 30 dB on three films; 48 channels 33 (docs/own_clips.md), of a noise that the network of 128
  # numbers a token must carry too
  c.codec.update(channels=32, lapped=True)
  if variant != "smoke":
    # three films are known by heart after 1,000 updates of 8; `full`, for more, was not measured
    c.teacher.update(steps=1000 if variant == "main" else 3000, batch=8)
    c.trajectories.update(count=96, batch=16)
    c.causal_init.update(steps=300, batch=8)
    c.distill.update(steps=120, batch=8, ema_start=10)  # 24 updates of the generator
    c.log.update(preview_every=250)
  c.sample.update(count=6, batch=6)
  return c
