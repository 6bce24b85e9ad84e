"""Whether a shape that passes behind the screen comes back, and with its own colour.

A shape in sight has its centre to the left, the right, above or below the screen. A video's passage
is from the first of these sides on which it is seen to the opposite one: captions do not name the
colour, so a model that shows it there again has remembered it. A shape that is seen nowhere else,
or comes out elsewhere, has not come back. Only the first passage of a video is measured.

Colours are indices into shapes_world.COLOURS, of the nearest true rendering of every frame.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from hiar_jax.data.shapes_world import COLOURS

LEAST_FRAMES = 3  # in sight on one side; fewer are taken for errors of the fit


@dataclasses.dataclass(frozen=True)
class Passage:
  """One video: None for what was not seen."""

  before: int | None = None  # colour on the first side: that of most frames
  after: int | None = None  # colour on the opposite side
  unseen: int | None = None  # frames between the two in which the shape is not in sight


def find_passage(colour: np.ndarray, xy: np.ndarray, seen: np.ndarray, size: int) -> Passage:
  """Finds the first passage of a video of one shape.

  colour: int [f]. xy: [f, 2], centres, pixels. seen: bool [f], whether the shape is in sight and
  recognised; colour and xy of other frames are not read. size: pixels of a frame.
  """
  frames = np.flatnonzero(seen)
  offset = xy[frames] - size / 2
  # A shape in sight is beyond an edge of the screen, along the axis of its larger offset.
  axis = np.abs(offset).argmax(-1)
  side = 2 * axis + (np.take_along_axis(offset, axis[:, None], -1)[:, 0] > 0)
  visits: list[np.ndarray] = []  # of sides, in order: the frames of each
  sides: list[int] = []
  for part in np.split(np.arange(len(frames)), np.flatnonzero(np.diff(side)) + 1):
    if len(part) < LEAST_FRAMES:
      continue
    if sides and sides[-1] == side[part[0]]:
      visits[-1] = np.concatenate([visits[-1], frames[part]])
    else:
      visits.append(frames[part])
      sides.append(int(side[part[0]]))
  if not visits:
    return Passage()
  before = int(np.bincount(colour[visits[0]]).argmax())
  if len(visits) < 2 or sides[1] != sides[0] ^ 1:  # the other side of the same axis
    return Passage(before)
  after = int(np.bincount(colour[visits[1]]).argmax())
  return Passage(before, after, int(visits[1][0] - visits[0][-1]) - 1)


def summarise(passages: Sequence[Passage], hidden: int) -> dict:
  """Returns what n videos of a world with `hidden` frames out of sight come to, as JSON values:

  returned: share of all videos whose shape comes back on the opposite side.
  agree: share of these in which it has the colour from before; None where none comes back.
  chance: that share if the colours after were dealt out among these videos at random: the sum over
    colours of the products of their shares before and after.
  unseen: mean frames out of sight, of these.
  early: share of these whose shape is out of sight for fewer than `hidden` frames.
  colours: share of each colour before the screen, of the videos in which a shape was seen.
  videos: per video {"before", "after": names of colours or None; "agree": None where it does not
    come back; "unseen"}.
  """
  back = [p for p in passages if p.after is not None]

  def mean(values):
    return float(np.mean(list(values))) if back else None

  seen = _shares([p.before for p in passages if p.before is not None])
  chance = _shares([p.before for p in back]) @ _shares([p.after for p in back])
  return {
    "returned": len(back) / len(passages),
    "agree": mean(p.before == p.after for p in back),
    "chance": float(chance) if back else None,
    "unseen": mean(p.unseen for p in back),
    "early": mean(p.unseen < hidden for p in back),
    "colours": {colour: float(share) for colour, share in zip(COLOURS, seen, strict=True)},
    "videos": [
      {
        "before": _name(p.before),
        "after": _name(p.after),
        "agree": None if p.after is None else p.before == p.after,
        "unseen": p.unseen,
      }
      for p in passages
    ],
  }


def _shares(colours: list[int]) -> np.ndarray:
  """Returns the share of each of COLOURS, [colours]; zeros of none."""
  counts = np.bincount(np.asarray(colours, int), minlength=len(COLOURS))
  return counts / max(1, len(colours))


def _name(colour: int | None) -> str | None:
  return None if colour is None else list(COLOURS)[colour]
