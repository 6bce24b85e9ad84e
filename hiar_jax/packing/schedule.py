"""FramePack's schedules: which frames beside a section are its context, and how each is packed.

FramePack (arXiv 2504.12626, v3) predicts a section of frames from frames before and after it. The
less important a frame, the larger the kernel that turns it into tokens, so that any length of
history takes a fixed number of them. A schedule is written as in the paper's Table 1, in the order
of time:

    td_f16k4f2k2f1k1_g9          16 frames by kernel k4, 2 by k2, the last one by k1; then 9 new
    td_f16k4f2k2f1k1_g9_x_f1k1   and the first frame of what comes later, some frames left out
    f1k1_x_g9_f1k1f4k2f16k4_td   towards a real first frame: the history lies behind the section

    fNkP   N frames by kernel kP = (P, 2P, 2P) of frames, rows and columns for patches of (1, 2, 2)
    gN     the N frames that are generated
    x      frames between its neighbours are left out; what lies beyond is the video's start or end
    td, ta, tc   the tail, frames beyond those that are named: deleted, appended (one pixel each),
                 or compressed into one frame's worth (the mean of all)
    +D     the history is replaced by centroids of a codebook

Groups keep the order of time. Tokens of L frames of h x w patches under kP: ceil(L/P) ceil(h/P)
ceil(w/P), the last frame, row and column being repeated up to whole kernels.
"""

import dataclasses
import re

import numpy as np

from hiar_jax.errors import UserError

POOLS = (1, 2, 4, 8, 16)
KEPT_TAILS = ("ta", "tc")
TAILS = ("td", *KEPT_TAILS)


@dataclasses.dataclass(frozen=True)
class Group:
  """`frames` frames that lie together, packed by the kernel of `pool` frames, rows and columns of
  patches.
  """

  frames: int
  pool: int

  def tokens(self, rows: int, columns: int) -> int:
    """Returns the tokens of the group, for frames of rows x columns patches."""
    return -(-self.frames // self.pool) * -(-rows // self.pool) * -(-columns // self.pool)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A parsed schedule. start, end: groups at the video's ends, beyond an x; before, after: those
  next to the section. before_tail, after_tail: one of TAILS, or '' where the schedule names none.
  """

  notation: str
  generate: int
  start: tuple[Group, ...] = ()
  before: tuple[Group, ...] = ()
  after: tuple[Group, ...] = ()
  end: tuple[Group, ...] = ()
  before_tail: str = ""
  after_tail: str = ""
  discretised: bool = False

  @property
  def groups(self) -> tuple[Group, ...]:
    """All groups, in the order of time."""
    return (*self.start, *self.before, *self.after, *self.end)

  @property
  def pools(self) -> tuple[int, ...]:
    """The kernels of all groups, each once."""
    return tuple(sorted({group.pool for group in self.groups}))

  @property
  def history(self) -> int:
    """The frames of all groups."""
    return sum(group.frames for group in self.groups)

  def tokens(self, rows: int, columns: int) -> int:
    """Returns the tokens of context and section, for frames of rows x columns patches, whatever the
    length of the history (of an appended tail none, of a compressed one those of its kernel).
    """
    tails = sum(-(-rows // p) * -(-columns // p) for p in self.compressed_pools)
    context = sum(group.tokens(rows, columns) for group in self.groups)
    return context + tails + self.generate * rows * columns

  @property
  def compressed_pools(self) -> tuple[int, ...]:
    """The kernel of each compressed tail: that of the group next to it."""
    pools = []
    if self.before_tail == "tc":
      pools.append(self.before[0].pool)
    if self.after_tail == "tc":
      pools.append(self.after[-1].pool)
    return tuple(pools)

  def numbers(self, first: int, known: int) -> tuple[np.ndarray, ...]:
    """Returns the frame numbers of each group, int [group.frames], in time's order.

    first: of the section. known: the first frame of what lies beyond the x behind it. Numbers below
    0 or behind the video's end are of no frame.
    """
    runs = (
      (self.start, 0),
      (self.before, first - sum(group.frames for group in self.before)),
      (self.after, first + self.generate),
      (self.end, known),
    )
    found = []
    for groups, at in runs:
      for group in groups:
        found.append(np.arange(at, at + group.frames))
        at += group.frames
    return tuple(found)


def parse(notation: str) -> Schedule:
  """Returns the schedule of a notation.

  Raises UserError, which quotes the notation and the part that cannot be read, for anything else.
  """
  text = str(notation)
  body, plus, marks = text.partition("+")
  if plus and marks != "D":
    raise _wrong(text, f"+{marks}", "behind a + stands D (discretised history)")
  parts = body.split("_")
  generated = [i for i, part in enumerate(parts) if re.fullmatch(r"g[1-9]\d*", part)]
  if len(generated) != 1:
    found = ", ".join(parts[i] for i in generated) or "none"
    raise _wrong(text, found, "exactly one gN says how many frames are generated")
  at = generated[0]
  left, right = parts[:at], parts[at + 1 :]
  start, before_tail, before = _side(text, left)
  end, after_tail, after = _side(text, right[::-1])
  return Schedule(
    notation=text,
    generate=int(parts[at][1:]),
    start=_groups(text, start),
    before=_groups(text, before),
    after=_groups(text, after[::-1]),
    end=_groups(text, end[::-1]),
    before_tail=before_tail,
    after_tail=after_tail,
    discretised=bool(plus),
  )


def _side(text: str, parts: list[str]) -> tuple[list[str], str, list[str]]:
  """Returns (parts beyond an x, the tail, parts next to the section) of a side, read inwards."""
  outside, inside = [], parts
  if "x" in parts:
    outside, inside = parts[: parts.index("x")], parts[parts.index("x") + 1 :]
    if not outside:
      raise _wrong(text, "x", "beyond an x stand frames of the video's start or end")
  tail = inside[0] if inside and inside[0] in TAILS else ""
  inside = inside[1:] if tail else inside
  if tail and not inside:
    raise _wrong(text, tail, "a tail lies beside frames that are next to the section")
  return outside, tail, inside


def _groups(text: str, parts: list[str]) -> tuple[Group, ...]:
  groups = []
  for part in parts:
    if not re.fullmatch(r"(?:f\d+k\d+)+", part):
      raise _wrong(text, part, "expected groups of frames as f16k4f2k2f1k1, x, td, ta or tc")
    for frames, pool in re.findall(r"f(\d+)k(\d+)", part):
      if int(pool) not in POOLS or not int(frames):
        kernels = ", ".join(f"k{pool}" for pool in POOLS)
        raise _wrong(text, f"f{frames}k{pool}", f"expected at least 1 frame and one of {kernels}")
      groups.append(Group(int(frames), int(pool)))
  return tuple(groups)


def _wrong(text: str, part: str, what: str) -> UserError:
  return UserError(f"schedule {text!r}: {part!r}: {what}; as td_f16k4f2k2f1k1_g9")
