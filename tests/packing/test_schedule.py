"""FramePack's notation: what it says, how many tokens that takes, and what cannot be read."""

import pytest

from hiar_jax.errors import UserError
from hiar_jax.packing import schedule
from hiar_jax.packing.schedule import Group, parse

# 480 x 832: latents of 60 x 104, patches of 2 x 2
ROWS, COLUMNS = 30, 52
FRAME = ROWS * COLUMNS


def lengths(groups) -> list[tuple[int, int]]:
  return [(group.frames, group.pool) for group in groups]


def test_vanilla():
  found = parse("td_f16k4f2k2f1k1_g9")
  assert lengths(found.before) == [(16, 4), (2, 2), (1, 1)] and found.generate == 9
  assert (found.before_tail, found.after_tail, found.discretised) == ("td", "", False)
  assert not (found.start or found.after or found.end) and found.history == 19


def test_anti_drifting():
  found = parse("td_f16k4f2k2f1k1_g9_x_f1k1")
  assert lengths(found.before) == [(16, 4), (2, 2), (1, 1)] and lengths(found.end) == [(1, 1)]
  assert found.after == ()


def test_inverted():
  found = parse("f1k1_x_g9_f1k1f4k2f16k4_td")
  assert lengths(found.start) == [(1, 1)] and found.before == ()
  assert lengths(found.after) == [(1, 1), (4, 2), (16, 4)]
  assert (found.before_tail, found.after_tail) == ("", "td")


def test_a_kept_first_frame_and_discretised_history():
  """The published F1: the first frame for ever, then the last ones."""
  found = parse("f1k1_x_td_f16k4f2k2f1k1_g9+D")
  assert lengths(found.start) == [(1, 1)] and lengths(found.before) == [(16, 4), (2, 2), (1, 1)]
  assert found.before_tail == "td" and found.discretised


def test_both_sides_may_be_symmetric():
  found = parse("ta_f4k2f1k1_g9_f1k1f4k2_tc")
  assert lengths(found.before) == [(4, 2), (1, 1)] and lengths(found.after) == [(1, 1), (4, 2)]
  assert (found.before_tail, found.after_tail) == ("ta", "tc")


@pytest.mark.parametrize(
  "notation, context",
  [
    # as the published code counts them, padded to whole kernels (method of FramePack, 480 x 832):
    # 416 of 4x, 390 of 2x, 3120 of two frames by k1
    ("f1k1_x_td_f16k4f2k2f1k1_g9", 416 + 390 + 3120),
    ("td_f16k4f2k2f1k1_g9", 416 + 390 + 1560),
    ("td_f8k8f4k4f2k2f1k1_g9", 28 + 104 + 390 + 1560),
    ("td_f16k16f1k1_g9", 8 + 1560),
    ("tc_f16k4f1k1_g9", 416 + 1560 + 104),
  ],
)
def test_tokens(notation, context):
  assert parse(notation).tokens(ROWS, COLUMNS) == context + 9 * FRAME


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_tokens_of_a_geometric_progression_are_the_closed_form(levels):
  """Eq. 2: L = S L_f + L_f sum of lambda^-i, here lambda = 8 and kernels that divide the frame."""
  groups = "".join(f"f{2**i}k{2**i}" for i in reversed(range(levels)))
  found = parse(f"td_{groups}_g3")
  frame = 16 * 32
  expected = 3 * frame + frame * (1 - 4.0**-levels) / (1 - 1 / 4)
  assert found.tokens(16, 32) == pytest.approx(expected, abs=0)


def test_frames_of_a_section():
  numbers = parse("f1k1_x_td_f4k4f2k2f1k1_g9_x_f1k1").numbers(20, 40)
  assert [group.tolist() for group in numbers] == [[0], [13, 14, 15, 16], [17, 18], [19], [40]]
  numbers = parse("f1k1_x_g9_f1k1f2k2_td").numbers(10, 99)
  assert [group.tolist() for group in numbers] == [[0], [19], [20, 21]]


@pytest.mark.parametrize(
  "notation, part, expected",
  [
    ("td_f16k3_g9", "f16k3", "one of k1, k2, k4, k8, k16"),
    ("td_f0k1_g9", "f0k1", "at least 1 frame"),
    ("f1k1", "none", "exactly one gN"),
    ("g9_f1k1_g9", "g9, g9", "exactly one gN"),
    ("f1k1_g0", "none", "exactly one gN"),
    ("x_f1k1_g9", "x", "beyond an x"),
    ("f1k1_x_f2k2_x_f1k1_g9", "x", "expected groups"),
    ("td_g9", "td", "a tail lies beside frames"),
    ("td_x_f1k1_g9", "td", "expected groups"),
    ("f1k1_g9_f1k1_to", "to", "td, ta or tc"),
    ("16k4_g9", "16k4", "expected groups"),
    ("f1k1_g9+Q", "+Q", "stands D"),
    ("", "none", "exactly one gN"),
  ],
)
def test_what_cannot_be_read_is_quoted(notation, part, expected):
  with pytest.raises(UserError) as error:
    parse(notation)
  (line,) = str(error.value).splitlines()
  assert repr(notation) in line and repr(part) in line and expected in line


def test_tokens_of_a_group():
  assert Group(5, 4).tokens(5, 9) == 2 * 2 * 3
  assert schedule.POOLS == (1, 2, 4, 8, 16)
