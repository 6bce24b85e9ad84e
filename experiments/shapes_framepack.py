"""FramePack (arXiv 2504.12626) on the shapes world: the teacher learns to make nine frames from
packed history, of any length in a fixed number of tokens.

    python -m hiar_jax.train --config=experiments/shapes_framepack.py --workdir=runs/framepack
    python -m hiar_jax.train --config=experiments/shapes_framepack.py:full --workdir=runs/framepack

The first is an hour on two CPU cores, and what docs/long_videos.md compares with the other orders;
`full`, whose batches are four times as large, takes minutes on a GPU. Nothing is distilled: each
section takes `sample.steps` Euler steps.
"""

from ml_collections import config_dict

from hiar_jax.experiments import shapes

PACKING = "td_f16k4f2k2f1k1_g9"  # the paper's Table 1: 16 frames by (4, 8, 8), 2 by (2, 4, 4), 1


def get_config(variant: str = "main") -> config_dict.ConfigDict:
  c = shapes.get_config(variant)
  # five sections: the last one has 36 frames behind it, more than the schedule names
  c.data.frames = 45
  c.data.clips = 64 if variant == "smoke" else 3072
  # 8 x 8 tokens of 4 x 4 pixels: under kernel k4 a frame is 2 x 2 of them
  c.codec.update(patch=4, channels=16)
  c.history.update(block=9, window=0)  # a section; no window
  c.teacher.frames = 9  # as the base model, which knows clips of one section
  if variant != "smoke":
    # four times the tokens a clip of shapes.py
    c.teacher.update(steps=2000, batch=32 if variant == "full" else 8)
  if variant == "full":
    # a caption's direction holds up to the first wall, some five frames: of windows from anywhere
    # in 45 few can teach one. Half of them were not enough (33 % of the videos; main: 37 %)
    c.teacher.openings = 0.5
  c.framepack = config_dict.ConfigDict(
    dict(
      shapes.TRAINING,
      packing=PACKING,
      orders=("vanilla",),
      steps={"smoke": 10, "main": 1000, "full": 2000}[variant],
      batch=32 if variant == "full" else 8,
      lr=5e-4,
      rule="muon",  # this and the next two: as the teacher
      schedule="cosine",
      clip=1.0,
      ema_decay=0.998,
      given=0,
      published=False,  # frame indices are the frames' own: the world has places
      history_level="section",  # FramePack; Helios: "clean"
      hears=True,
      history_noise=0.0,  # Helios: .111 to .135 on given frames
      shift=5.0,  # the teacher's
      caption_dropout=0.1,
    )
  )
  # after 600 updates, 27 videos of 45 frames: error .0081; with 16 steps .0079, with guidance .0097
  c.sample.update(order="vanilla", steps=8, guidance=0.0)
  return c
