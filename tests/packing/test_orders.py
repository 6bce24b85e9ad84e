"""The orders of sections: the published ones exactly, and none that reads what is not there."""

import json

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.packing import orders
from hiar_jax.packing.schedule import parse
from tests.helpers import golden_cases

KEPT_START = parse("f1k1_x_td_f16k4f2k2f1k1_g9")
TOWARDS_START = parse("f1k1_x_g9_f1k1f2k2f16k4_td")
FILLING = parse("td_f16k4f2k2f1k1_g9_x_f1k1")
# order of a recording -> (schedule without g, steps, given frames, the recording's names of the
# groups)
PUBLISHED = {
  "vanilla": ("f1k1_x_td_f16k4f2k2f1k1_{}", orders.vanilla, 1, ("first", "4x", "2x", "nearest")),
  "helios_text_to_video": (
    "f1k1_x_td_f16k4f2k2f1k1_{}",
    orders.vanilla,
    0,
    ("first", "4x", "2x", "nearest"),
  ),
  "inverted_anti_drifting": (
    "f1k1_x_{}_f1k1f2k2f16k4_td",
    orders.inverted,
    1,
    ("first", "nearest", "2x", "4x"),
  ),
}
FOLDERS = golden_cases.folders("framepack.json")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_golden_orders(folder):
  """All that is recorded of all sections of videos of 1 to 12 sections."""
  recorded = json.loads((folder / "orders.json").read_text())
  window = json.loads((folder / "framepack.json").read_text())["window"]
  assert len(recorded) >= 300
  for section in recorded:
    order = section["order"].removesuffix("_with_last_image")
    notation, steps, given, names = PUBLISHED[order]
    schedule, count, at = (
      parse(notation.format(f"g{window}")),
      section["sections"],
      section["section"],
    )
    last = order != section["order"]  # a last image lies behind the sections
    step = orders.plan(schedule, steps(count), given=given, behind=int(last), published=True)[at]
    image = given + count * schedule.generate if last else None
    # the published code shows it to the section made first alone, and forgets it then
    named = [
      ["last image" if i == image and at == 0 else None if i in (-1, image) else i for i in group]
      for group in (group.tolist() for group in step.context)
    ]
    context = dict(zip(names, named, strict=True))
    indices = dict(zip(names, (i.tolist() for i in step.context_indices), strict=True))
    found = {
      "order": section["order"],
      "sections": count,
      "section": at,
      "latent_frames": given + count * schedule.generate,
      "generates": step.generates.tolist(),
      "context": _levels(context),
      "indices": _levels(indices) | {"generated": step.indices.tolist()},
    }
    if order == "inverted_anti_drifting":
      found["padding"] = orders.blanks(count, at, schedule)
    assert found == section


def _levels(groups: dict) -> dict:
  """Groups by the levels of a recording, where the first frame and the nearest one share one."""
  return {
    "4x": groups["4x"],
    "2x": groups["2x"],
    "clean": groups["first"] + groups["nearest"],
  }


@pytest.mark.parametrize("sections", range(1, 13))
@pytest.mark.parametrize("order", orders.ORDERS)
@pytest.mark.parametrize("schedule", [KEPT_START, TOWARDS_START, FILLING], ids=lambda s: s.notation)
def test_nothing_is_read_before_it_is_made(order, schedule, sections):
  """A video of NaNs in which each step writes what it makes: no context holds a NaN."""
  given = 1 if order == "inverted" else 0
  video = np.full(given + sections * schedule.generate, np.nan)
  video[:given] = 0
  for step in orders.plan(schedule, orders.steps_of(order, sections), given=given):
    for group in step.context:
      assert np.isfinite(video[group[group >= 0]]).all()
    assert np.isnan(video[step.generates]).all()  # and nothing is made twice
    video[step.generates] = 1
  assert np.isfinite(video).all()


def test_both_ends_lead_the_gap():
  first, *rest = orders.plan(FILLING, orders.both_ends(4))
  assert first.generates.tolist() == [*range(9), *range(27, 36)]
  assert all((group == -1).all() for group in first.context)
  assert [step.context[-1].tolist() for step in rest] == [[27], [27]]
  assert rest[0].context[-2].tolist() == [8] and rest[1].context[-2].tolist() == [17]


def test_true_indices_are_the_frames_own():
  for step in orders.plan(FILLING, orders.both_ends(5)):
    np.testing.assert_array_equal(step.indices, step.generates)
    for frames, indices in zip(step.context, step.context_indices, strict=True):
      np.testing.assert_array_equal(frames[frames >= 0], indices[frames >= 0])


def test_planned_endpoints():
  steps = orders.endpoints(6, [5, 0, 3])
  assert steps == [(0, 3, 5), (1,), (2,), (4,)]
  made = orders.plan(FILLING, steps)
  assert [step.context[-1].tolist() for step in made[1:]] == [[27], [27], [45]]
  with pytest.raises(UserError, match="endpoint 6: the video has sections 0 to 5"):
    orders.endpoints(6, [6])


def test_published_blanks():
  assert [orders.blanks(5, i, TOWARDS_START) for i in range(5)] == [3, 2, 2, 1, 0]
  assert [orders.blanks(3, i, TOWARDS_START) for i in range(3)] == [2, 1, 0]
  assert orders.blanks(5, 0, KEPT_START) == 0


def test_tails_are_the_frames_that_no_group_names():
  schedule = parse("f1k1_x_tc_f2k2f1k1_g2_f1k1_ta")
  made = orders.plan(schedule, orders.vanilla(5))
  assert [step.tails[0].tolist() for step in made] == [[], [], [], [1, 2], [1, 2, 3, 4]]
  assert all(step.tails[1].size == 0 for step in made)
  made = orders.plan(schedule, orders.inverted(4), given=1)
  assert [step.tails[1].tolist() for step in made] == [[], [8], [6, 7, 8], [4, 5, 6, 7, 8]]
  schedule = parse("td_f2k2f1k1_g2_f1k1_tc")  # of two sides, one may delete
  made = orders.plan(schedule, orders.endpoints(9, [3, 8, 0]))
  assert made[3].generates.tolist() == [8, 9] and made[3].tails[0].size == 0
  assert made[3].tails[1].tolist() == [16, 17]
  made = orders.plan(parse("td_f2k2f1k1_g2_f1k1_td"), orders.inverted(4), given=1)
  assert not any(side.size for step in made for side in step.tails)
  with pytest.raises(UserError, match="no place for a tail; expected td"):
    orders.plan(schedule, orders.vanilla(5), published=True)


def test_bad_orders():
  with pytest.raises(UserError, match="order = 'backwards': expected one of vanilla, both_ends"):
    orders.steps_of("backwards", 3)
  with pytest.raises(UserError, match="sections = 0: expected at least 1"):
    orders.steps_of("vanilla", 0)
