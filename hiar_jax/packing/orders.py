"""The orders in which the sections of a long video are made, as data.

An order is a list of steps, each the numbers of the sections that are made at once:

    vanilla     (0), (1), (2), ...           in time's order, the only causal one
    both_ends   (0, n-1), (1), (2), ...      both ends first, then the gap from its start
    inverted    (n-1), ..., (1), (0)         from the end towards a first frame that is real
    endpoints   (0, e1, e2, ...), the rest   several planned ends first

(FramePack, arXiv 2504.12626, section 3.2 and v3's planned endpoints.) `plan` says for each step
which frames it makes, which frames its context holds by a schedule, and the frame indices of both
for the rotations. Frames that are not made yet are never context: their place holds -1.

Frames may be there before any section, at the video's start (an image, a video that goes on) and at
its end (a last image, a video that is led up to). What lies behind a loop is its start.
"""

from collections.abc import Callable, Sequence
import dataclasses
import re

import numpy as np

from hiar_jax.errors import UserError, one_of
from hiar_jax.packing.schedule import KEPT_TAILS, Schedule

Steps = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Step:
  """What is made at once.

  sections: their numbers. generates: frames of the video. indices: their frame indices. context:
  of each group of the schedule the frames of the video, -1 for those that are not there.
  context_indices: their frame indices. tails: frames that are there beyond those that are named,
  before the section and behind it; none on a side whose tail is deleted. tail_kinds: of the same
  sides, as schedule.TAILS. candidates: of the same sides, all frames that the groups next to the
  section may hold where they are chosen by similarity (packing.similarity); None: chosen by time.
  """

  sections: tuple[int, ...]
  generates: np.ndarray
  indices: np.ndarray
  context: tuple[np.ndarray, ...]
  context_indices: tuple[np.ndarray, ...]
  tails: tuple[np.ndarray, np.ndarray] = (np.arange(0), np.arange(0))
  tail_kinds: tuple[str, str] = ("", "")
  candidates: tuple[np.ndarray, np.ndarray] | None = None


def vanilla(sections: int) -> Steps:
  """In time's order."""
  return [(i,) for i in range(sections)]


def both_ends(sections: int) -> Steps:
  """The first and the last section at once, then those between them, in time's order."""
  return [tuple(dict.fromkeys((0, sections - 1))), *((i,) for i in range(1, sections - 1))]


def inverted(sections: int) -> Steps:
  """From the last section to the first."""
  return [(i,) for i in reversed(range(sections))]


ORDERS: dict[str, Callable[[int], Steps]] = {
  "vanilla": vanilla,
  "both_ends": both_ends,
  "inverted": inverted,
}


def endpoints(sections: int, ends: Sequence[int]) -> Steps:
  """Returns the steps that make the sections `ends` at once and then the others in time's order.

  Raises UserError for a section that the video has not.
  """
  for end in ends:
    if not 0 <= end < sections:
      raise UserError(f"endpoint {end}: the video has sections 0 to {sections - 1}")
  first = tuple(sorted(set(ends)))
  return [first, *((i,) for i in range(sections) if i not in first)]


def steps_of(order: str, sections: int, *, ended: bool = False) -> Steps:
  """Returns the steps of an order by name; `endpoints:0,3,7` is that of planned ends.

  ended: what lies behind the last section is there (a last frame, or the start of a loop), so that
  both_ends has no end to make first. Raises UserError for an unknown order, or no section.
  """
  name, _, ends = order.partition(":")
  if sections < 1:
    raise UserError(f"sections = {sections}: expected at least 1")
  if name == "endpoints" and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", ends):
    return endpoints(sections, [int(end) for end in ends.split(",")])
  one_of([*ORDERS, "endpoints:0,3,7"], order=order)
  return vanilla(sections) if order == "both_ends" and ended else ORDERS[order](sections)


def plan(
  schedule: Schedule,
  steps: Steps,
  *,
  given: int = 0,
  behind: int = 0,
  loop: bool = False,
  published: bool = False,
  similar: bool = False,
) -> list[Step]:
  """Returns what each step makes, from what, and where.

  given, behind: frames of the video's start and end that are there before any section (1: an
  image). loop: what lies behind the video's end is its start. published: the frame indices of the
  published code, which count context and section on from the video's start with a few blanks,
  whatever the true distance; else the frames' own numbers. similar: the frames next to a section
  are chosen by similarity when it is made (packing.similarity), so that context and tails here say
  how many they are.

  Raises UserError where the section beside frames that are given does not see the nearest of them,
  and for published indices of a schedule that keeps a tail, or with `similar`: there are none.
  """
  if published and {schedule.before_tail, schedule.after_tail} & set(KEPT_TAILS):
    raise UserError(
      f"schedule {schedule.notation!r}: the published frame indices have no place for a tail; "
      "expected td, or published = False"
    )
  if published and similar:
    raise UserError(
      f"schedule {schedule.notation!r}: the published frame indices are of places, not of frames; "
      "frames sorted by similarity keep their own, so expected published = False"
    )
  width = schedule.generate
  count = 1 + max(number for step in steps for number in step)
  end = given + count * width  # the first frame behind the sections
  total = end + behind
  made, plans = {*range(given), *range(end, total)}, []
  for at, step in enumerate(steps):
    firsts = [given + number * width for number in step]
    generates = np.concatenate([np.arange(first, first + width) for first in firsts])
    # the same frame may be there twice, at its own place and behind a loop's end
    there = made | {total + i for i in made} if loop else made
    known = min((i for i in made if i >= firsts[0] + width), default=end)
    numbers = schedule.numbers(firsts[0], known)
    seen = there & {int(i) for group in numbers for i in group}
    if given and 0 in step and given - 1 not in seen:
      raise _unseen_start(schedule, given)
    if (behind or loop) and count - 1 in step and end not in seen:
      raise _unseen_end(schedule, loop)
    context = tuple(np.where(np.isin(group, list(there)), group % total, -1) for group in numbers)
    indices = generates, numbers
    if published:
      indices = counted_on(schedule, blanks(len(steps), at, schedule))
    kinds = schedule.before_tail, schedule.after_tail
    candidates = None
    if similar:
      candidates = _candidates(schedule, numbers, firsts[0], made)
      tails = _beyond(schedule, candidates)
    else:
      tails = _tails(schedule, numbers, firsts[0], made)
    plans.append(Step(step, generates, indices[0], context, indices[1], tails, kinds, candidates))
    made.update(generates.tolist())
  return plans


def _unseen_start(schedule: Schedule, given: int) -> UserError:
  return UserError(
    f"schedule {schedule.notation!r}: the first section does not see the last of the {given} "
    "frames before it; groups before the section show it, as td_f16k4f2k2f1k1_g9 has them"
  )


def _unseen_end(schedule: Schedule, loop: bool) -> UserError:
  what = "the start, to which a loop returns" if loop else "the frame behind it"
  if not (schedule.after or schedule.end):
    why = "groups behind the section show it, as td_f16k4f2k2f1k1_g9_x_f1k1 has them"
  elif loop:
    why = "in this order it is made too early; from a first frame, or in vanilla order, it does"
  else:
    why = "in this order another frame comes first; in vanilla order it does"
  return UserError(f"schedule {schedule.notation!r}: the last section does not see {what}; {why}")


def blanks(steps: int, at: int, schedule: Schedule) -> int:
  """Returns the sections that lie between the video's start and a section of the inverted order, as
  published: n - 1 to 0, and for more than four sections 3, 2, ..., 2, 1, 0.
  """
  if not schedule.after:
    return 0
  paddings = list(reversed(range(steps)))
  if steps > 4:
    paddings = [3] + [2] * (steps - 3) + [1, 0]
  return paddings[at]


def _tails(
  schedule: Schedule, numbers: tuple[np.ndarray, ...], first: int, made: set[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the frames of `made` that no group names, before and behind a section from `first`."""
  kept = [tail in KEPT_TAILS for tail in (schedule.before_tail, schedule.after_tail)]
  if not any(kept):
    return np.arange(0), np.arange(0)
  named = np.concatenate(numbers)
  beyond = np.setdiff1d(np.fromiter(made, int), named)
  sides = beyond[beyond < first], beyond[beyond >= first + schedule.generate]
  return tuple(side if keep else side[:0] for side, keep in zip(sides, kept, strict=True))


def _candidates(
  schedule: Schedule, numbers: tuple[np.ndarray, ...], first: int, made: set[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the frames of `made` before a section from `first` and behind it, without those that
  the groups beyond an x hold in any case.
  """
  behind = len(numbers) - len(schedule.end)
  kept = np.concatenate([*numbers[: len(schedule.start)], *numbers[behind:], np.arange(0)])
  free = np.setdiff1d(np.fromiter(made, int), kept)
  return free[free < first], free[free >= first + schedule.generate]


def _beyond(
  schedule: Schedule, candidates: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns as many frames as are left for each tail that is kept, the farthest ones."""
  before, after = (
    max(len(frames) - sum(group.frames for group in groups), 0) if tail in KEPT_TAILS else 0
    for frames, groups, tail in (
      (candidates[0], schedule.before, schedule.before_tail),
      (candidates[1], schedule.after, schedule.after_tail),
    )
  )
  return candidates[0][:before], candidates[1][len(candidates[1]) - after :]


def counted_on(schedule: Schedule, blank: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """Returns (indices of the section, of each group): one after the other, `blank` sections left out
  before the section.
  """
  at, found = 0, []
  for group in (*schedule.start, *schedule.before):
    found.append(np.arange(at, at + group.frames))
    at += group.frames
  at += blank * schedule.generate
  section = np.arange(at, at + schedule.generate)
  at += schedule.generate
  for group in (*schedule.after, *schedule.end):
    found.append(np.arange(at, at + group.frames))
    at += group.frames
  return section, tuple(found)
