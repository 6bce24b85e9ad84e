"""Frames that are there before any section, at either end: which frames each section sees, drawn.

A row a step, a character a frame: G is made, 1 and 2 are context by kernels k1 and k2, - is there
and not read, . is not there.
"""

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.packing import orders
from hiar_jax.packing.schedule import parse

FORWARDS = "td_f2k2f1k1_g2"
FILLING = "td_f2k2f1k1_g2_x_f1k1"
BACKWARDS = "f1k1_x_g2_f1k1f2k2_td"
NEXT_TO = "td_f2k2f1k1_g2_f1k1_td"  # sees what follows it, and no end far away
SCHEDULES = (FORWARDS, FILLING, BACKWARDS, NEXT_TO)


def drawn(notation: str, order: str, sections: int, *, given=0, behind=0, loop=False) -> list[str]:
  """Draws the steps of an order, and checks what they say of a frame against what is there."""
  schedule = parse(notation)
  steps = orders.steps_of(order, sections, ended=bool(behind or loop))
  total = given + schedule.generate * sections + behind
  video = np.full(total, np.nan)
  video[:given] = video[total - behind :] = 0
  rows = []
  for step in orders.plan(schedule, steps, given=given, behind=behind, loop=loop):
    row = np.where(np.isfinite(video), "-", ".")
    for group, frames, indices in zip(
      schedule.groups, step.context, step.context_indices, strict=True
    ):
      there = frames >= 0
      assert np.isfinite(video[frames[there]]).all()  # nothing is read before it is made
      assert ((indices == frames) | loop & (indices == frames + total))[there].all()
      # and nothing that is there, where a group looks for it, is left out
      inside = (indices >= 0) & (indices < total)
      assert np.isnan(video[indices[inside & ~there]]).all()
      row[frames[there]] = str(group.pool)
    assert np.isnan(video[step.generates]).all()  # nothing is made twice
    row[step.generates], video[step.generates] = "G", 1
    rows.append("".join(row))
  assert np.isfinite(video).all()
  return rows


DRAWN = {
  "from an image": (FORWARDS, "vanilla", 3, {"given": 1}, "1GG.... 221GG.. --221GG"),
  "a video goes on": (FORWARDS, "vanilla", 2, {"given": 4}, "-221GG.. ---221GG"),
  "towards an end": (FILLING, "vanilla", 3, {"behind": 1}, "GG....1 21GG..1 -221GG1"),
  "both ends, of which one is there": (
    FILLING,
    "both_ends",
    3,
    {"behind": 1},
    "GG....1 21GG..1 -221GG1",
  ),
  "both ends, from an image": (
    FILLING,
    "both_ends",
    4,
    {"given": 1},
    "1GG....GG 221GG..1- --221GG1-",
  ),
  "from an image to another": (
    FILLING,
    "both_ends",
    3,
    {"given": 1, "behind": 1},
    "1GG....1 221GG..1 --221GG1",
  ),
  "what leads up to a video": (
    BACKWARDS,
    "inverted",
    3,
    {"behind": 4},
    "....GG122- ..GG122--- GG122-----",
  ),
  "from an image to a video": (
    BACKWARDS,
    "inverted",
    3,
    {"given": 1, "behind": 4},
    "1....GG122- 1..GG122--- 1GG122-----",
  ),
  "a loop": (FILLING, "both_ends", 4, {"loop": True}, "GG...... 11GG.... 1221GG.. 1--221GG"),
  "a loop from an image, backwards": (
    BACKWARDS,
    "inverted",
    3,
    {"given": 1, "loop": True},
    "1....GG 2..GG12 1GG122-",
  ),
  "planned ends, and another behind them": (
    FILLING,
    "endpoints:0,2",
    4,
    {"given": 1, "behind": 1},
    "1GG..GG..1 221GG1-..- ----221GG1",
  ),
  "planned ends of a loop": (
    FILLING,
    "endpoints:0,2",
    4,
    {"loop": True},
    "GG..GG.. 21GG1-.. 1--221GG",
  ),
}


@pytest.mark.parametrize("case", DRAWN)
def test_what_a_section_sees(case):
  *what, ends, rows = DRAWN[case]
  assert drawn(*what, **ends) == rows.split()


ENDS = [
  {"given": given, "behind": behind, "loop": loop}
  for given in (0, 1, 5)
  for behind in (0, 1, 5)
  for loop in (False, True)
]


@pytest.mark.parametrize("sections", range(1, 13))
@pytest.mark.parametrize("order", [*orders.ORDERS, "endpoints:0"])
@pytest.mark.parametrize("notation", SCHEDULES)
def test_nothing_is_read_before_it_is_made(notation, order, sections):
  """With frames given at either end: `drawn` checks; or the nearest of them cannot be seen."""
  schedule, refused = parse(notation), []
  for ends in ENDS:
    try:
      rows = drawn(notation, order, sections, **ends)
    except UserError as error:
      assert repr(notation) in str(error)
      refused.append(ends)
    else:
      # beside frames that are given lies a section that saw the nearest of them
      first = next(row for row in rows if row[ends["given"]] == "G")
      assert not ends["given"] or first[ends["given"] - 1] in "12"
      last = next(row for row in rows if row[len(row) - ends["behind"] - 1] == "G")
      assert not ends["behind"] or last[-ends["behind"]] in "12"
      assert not ends["loop"] or ends["behind"] or last[0] in "12"
  sees_behind = bool(schedule.after or schedule.end)
  backwards_loop = lambda e: e["loop"] and not e["given"] and not e["behind"]
  for ends in ENDS:
    unseen = not sees_behind and (ends["behind"] or ends["loop"])
    # of a video that goes on towards its first frame, the last frame is not seen
    unseen |= ends["given"] > 1 and not schedule.before
    # a loop whose last section is made first, or is the only one, has no start yet to return to
    alone = sections == 1 or order == "inverted"
    unseen |= backwards_loop(ends) and alone
    assert (ends in refused) == bool(unseen), ends


def test_an_end_that_no_section_sees_is_named():
  plan = lambda notation, order, **ends: orders.plan(
    parse(notation), orders.steps_of(order, 4), **ends
  )
  with pytest.raises(UserError, match="'td_f2k2f1k1_g2': the last .* frame behind it; groups behi"):
    plan(FORWARDS, "vanilla", behind=1)
  with pytest.raises(UserError, match="'td_f2k2f1k1_g2': .* the start, to which a loop returns"):
    plan(FORWARDS, "vanilla", loop=True)
  with pytest.raises(
    UserError, match="'f1k1_x_g2.*': the first .* the last of the 3 frames before"
  ):
    plan(BACKWARDS, "inverted", given=3)
  with pytest.raises(UserError, match="_td': .* loop returns; in this order it is made too early"):
    plan(BACKWARDS, "inverted", loop=True)
  # made together with the first section, it sees what follows that one
  with pytest.raises(UserError, match="in this order another frame comes first; in vanilla order"):
    plan(NEXT_TO, "both_ends", behind=1)


def test_ends_by_name():
  assert orders.steps_of("endpoints:5, 0", 6) == [(0, 5), (1,), (2,), (3,), (4,)]
  assert orders.steps_of("both_ends", 3, ended=True) == orders.vanilla(3)
  assert orders.steps_of("inverted", 3, ended=True) == orders.inverted(3)
  for order in ("endpoints", "endpoints:", "endpoints:a", "endpoints:1,", "vanilla:1"):
    with pytest.raises(UserError, match=f"order = '{order}': expected one of vanilla.*endpoints:0"):
      orders.steps_of(order, 6)
  with pytest.raises(UserError, match="endpoint 6: the video has sections 0 to 5"):
    orders.steps_of("endpoints:0,6", 6)


def test_a_loop_counts_on():
  """What lies behind its end is the start, with the indices that follow the end."""
  *_, last = orders.plan(parse(FILLING), orders.vanilla(4), loop=True)
  assert last.context[-1].tolist() == [0] and last.context_indices[-1].tolist() == [8]
