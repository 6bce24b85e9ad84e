"""What a packed history remembers: a shape passes behind a screen for longer than a window lasts,
and its caption does not name its colour.

    python -m hiar_jax.train --config=experiments/shapes_screen.py --workdir=runs/screen
    python -m hiar_jax.train --config=experiments/shapes_screen.py:window \
      --workdir=runs/screen_window --config.stages_from=runs/screen
    python -m hiar_jax.train --config=experiments/shapes_screen.py:long \
      --workdir=runs/screen_long --config.stages_from=runs/screen

The first one packs 19 frames of history into 96 tokens. The others are its controls: `window` sees
three frames, which cannot know the colour; `long` sees 21 frames unpacked, in 1,344 tokens.
"""

from hiar_jax.experiments import shapes_framepack

PACKINGS = {
  "main": shapes_framepack.PACKING,
  # with the section's 9 frames it spans 12: as many as are out of sight, never both sides of them
  "window": "td_f3k1_g9",
  # seen from the section's last frame, the first side lies within it, wholly in sight
  "long": "td_f21k1_g9",
}


def get_config(variant: str = "main"):
  # one of a clip's five sections can show what is remembered: 1,000 updates of 8 taught it from
  # frames as they are (94 % of the colours), and not from packed ones (10 %)
  c = shapes_framepack.get_config("full" if variant in PACKINGS else variant)
  c.framepack.packing = PACKINGS.get(variant, shapes_framepack.PACKING)
  c.data.later = 0.0  # all clips begin on the first side
  # small and slow enough for 9 frames in sight, 12 wholly out of sight, and the return
  c.data.shape_size = 0.375
  c.data.pace = 0.275
  c.data.hidden = 12
  c.sample.length = 1.0  # a video has one passage
  return c
