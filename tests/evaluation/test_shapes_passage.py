"""What comes back from behind the screen: true clips all and with their colours, swapped ones with
another, and what never comes back is missing, not right; on imperfect pictures too.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import COLOURS, DIRECTIONS, WorldConfig
from hiar_jax.evaluation import report, shapes_truth
from hiar_jax.evaluation.shapes_passage import Passage, find_passage, summarise
from hiar_jax.training.samples import shapes_line

WORLD = WorldConfig(size=32, frames=45, shape_size=0.375, pace=0.275, hidden=12)
GROUND = shapes_world.render(
  # a shape far outside of the picture
  shapes_world.States(
    np.full((1, 1, 2), -99.0),
    np.zeros((1, 1, 2)),
    np.ones(1),
    np.zeros(1, int),
    np.zeros(1, int),
    0,
  ),
  shapes_world.background_image("plain", WORLD),
  WORLD,
)[0]
MIDDLE = 22  # a frame in which every shape is hidden


def scenes():
  """Six scenes: every direction, and every shape and colour."""
  rng = np.random.default_rng(0)
  found = [shapes_world.sample_scene(rng, WORLD) for _ in range(6)]
  for i, colour in enumerate(COLOURS):
    (shape,) = found[i].shapes
    found[i] = dataclasses.replace(found[i], shapes=(dataclasses.replace(shape, colour=colour),))
  return found


def draw(scene):
  under = shapes_world.background_image("plain", WORLD)
  return shapes_world.render(shapes_world.simulate(scene, WORLD.frames), under, WORLD)


SCENES = scenes()
CAPTIONS = [shapes_world.caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def clips():
  return np.stack([draw(scene) for scene in SCENES])


@pytest.fixture(scope="module")
def swapped(clips):
  """The same clips, from the middle on in the next colour."""
  colours = list(COLOURS)
  other = []
  for i, scene in enumerate(SCENES):
    shape = dataclasses.replace(scene.shapes[0], colour=colours[(i + 1) % 6])
    other.append(draw(dataclasses.replace(scene, shapes=(shape,))))
  return np.concatenate([clips[:, :MIDDLE], np.stack(other)[:, MIDDLE:]], 1)


def of_true_clips(world, **options):
  """The scores of a perfect model."""
  videos, captions = shapes_truth.true_clips(world, **options)
  return shapes_truth.measure(videos, captions, world)


def degrade(videos):
  """As a small model does it: faded, blurred and noisy; float in [-1, 1]."""
  x = videos / 127.5 - 1
  ground = GROUND / 127.5 - 1
  x = ground + 0.8 * (x - ground)
  for axis in (2, 3):
    x = 0.6 * x + 0.2 * (np.roll(x, 1, axis) + np.roll(x, -1, axis))
  return x + np.random.default_rng(1).normal(0, 0.08, x.shape)


def test_true_clips_come_back_as_they_were(clips):
  result = shapes_truth.measure(clips, CAPTIONS, WORLD)
  passage = result["passage"]
  assert (passage["returned"], passage["agree"], passage["early"]) == (1, 1, 0)
  assert passage["chance"] == pytest.approx(1 / 6)
  assert [video["before"] for video in passage["videos"]] == list(COLOURS)
  # Half of a shape is out of sight while its centre is behind the screen.
  low, high = WORLD.screen
  assert passage["unseen"] == pytest.approx((high - low) / WORLD.speed(""), abs=1)
  # All other measures are those of a perfect model, but for the colour, which no caption names.
  assert [result[name]["total"] for name in ("colour", "recognised", "shape", "direction")] == [
    None, 1, 1, 1
  ]  # fmt: skip
  assert result["motion_ratio"]["total"] == pytest.approx(1, abs=0.02)
  assert result["jumps"]["total"] == 0 and result["error"]["total"] < 2e-5
  assert result["relative_error"]["q100"] < 0.001
  assert "passage" in json.loads(json.dumps(result))


def test_the_expected_motion_is_that_of_what_is_in_sight():
  """Bounces are seen more often than steps behind the screen."""
  rng, (low, high), steps = np.random.default_rng(0), WORLD.screen, []
  for _ in range(40):
    scene = shapes_world.sample_scene(rng, WORLD)
    path = shapes_world.simulate(scene, 2000).position[:, 0]
    seen = ((path < low) | (path > high)).any(-1)
    moved = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    steps.append(moved[seen[1:] & seen[:-1]])
  speed = WORLD.speed("")
  expected = shapes_truth.expected_motion(speed, WORLD)
  assert expected == pytest.approx(np.concatenate(steps).mean(), rel=0.002)
  assert (
    expected < shapes_truth.expected_motion(speed, dataclasses.replace(WORLD, hidden=0)) * 0.995
  )


def test_jumps_are_told_by_the_pace(clips):
  """Five frames at once, three pixels, are a jump of so slow a shape."""
  jumping = np.delete(clips, slice(3, 7), 1)
  result = shapes_truth.measure(jumping, CAPTIONS, WORLD)
  assert 1 / 40 < result["jumps"]["total"] < 1 / 8  # one of each video's steps in sight
  assert result["passage"]["agree"] == 1


def test_another_colour_does_not_agree(swapped):
  passage = shapes_truth.measure(swapped, CAPTIONS, WORLD)["passage"]
  assert (passage["returned"], passage["agree"]) == (1, 0)
  for i, video in enumerate(passage["videos"]):
    assert (video["before"], video["after"]) == (list(COLOURS)[i], list(COLOURS)[(i + 1) % 6])


def test_what_never_comes_back_is_missing(clips):
  gone = clips.copy()
  gone[:4, MIDDLE:] = GROUND
  result = shapes_truth.measure(gone, CAPTIONS, WORLD)
  passage = result["passage"]
  assert passage["returned"] == pytest.approx(2 / 6) and passage["agree"] == 1
  for video in passage["videos"][:4]:
    assert (video["after"], video["agree"], video["unseen"]) == (None, None, None)
  # Nor do the other measures take it for hidden until the end.
  assert result["shape"]["fifths"][-1] == pytest.approx(2 / 6)
  assert [video["shape"] < 1 for video in result["prompts"]] == [True] * 4 + [False] * 2
  gone[:, MIDDLE:] = GROUND
  passage = shapes_truth.measure(gone, CAPTIONS, WORLD)["passage"]
  assert passage["returned"] == 0
  assert [passage[name] for name in ("agree", "chance", "unseen", "early")] == [None] * 4


@pytest.mark.slow
def test_imperfect_pictures_are_read_alike(clips, swapped):
  gone = clips.copy()
  gone[:, MIDDLE:] = GROUND
  videos = degrade(np.concatenate([clips, swapped, gone]))
  videos_passages = shapes_truth.measure(videos, CAPTIONS * 3, WORLD)["passage"]["videos"]
  assert [video["agree"] for video in videos_passages] == [True] * 6 + [False] * 6 + [None] * 6
  assert [video["before"] for video in videos_passages] == list(COLOURS) * 3


def test_nothing_to_be_seen_is_no_agreement():
  noise = np.random.default_rng(0).integers(0, 256, (1, 12, 32, 32, 3)).astype(np.uint8)
  for videos in (noise, np.broadcast_to(GROUND, noise.shape)):
    passage = shapes_truth.measure(videos, CAPTIONS[:1], WORLD)["passage"]
    assert passage["returned"] == 0 and passage["agree"] is None
    assert passage["videos"][0]["before"] is None and not any(passage["colours"].values())


def path(*parts):
  """(colour, x, y, frames) of parts in which the shape is seen; None for x where it is not."""
  rows = [part[:3] for part in parts for _ in range(part[3])]
  colour = np.array([row[0] for row in rows])
  seen = np.array([row[1] is not None for row in rows])
  xy = np.array([(row[1] or 0.0, row[2] or 0.0) for row in rows])
  return colour, xy, seen, 32


LEFT, RIGHT, TOP = (5.0, 15.0), (27.0, 15.0), (15.0, 5.0)
GONE = (None, None)


@pytest.mark.parametrize(
  "parts, expected",
  [
    ([(2, *LEFT, 9), (0, *GONE, 14), (2, *RIGHT, 9)], Passage(2, 2, 14)),
    ([(2, *RIGHT, 9), (0, *GONE, 14), (4, *LEFT, 3)], Passage(2, 4, 14)),
    # in sight all the way, as beside the screen
    ([(2, *LEFT, 9), (2, *RIGHT, 9)], Passage(2, 2, 0)),
    # turned round, came out elsewhere, or never seen
    ([(2, *LEFT, 9), (0, *GONE, 14), (4, *LEFT, 9)], Passage(2)),
    ([(2, *LEFT, 9), (0, *GONE, 14), (2, *TOP, 9)], Passage(2)),
    ([(0, *GONE, 40)], Passage()),
    # most frames decide on the colour, and errors of a frame or two are left out
    ([(1, *LEFT, 2), (2, *LEFT, 5), (0, *GONE, 9), (3, *RIGHT, 6), (2, *RIGHT, 5)],
     Passage(2, 3, 9)),
    ([(1, *RIGHT, 2), (2, *LEFT, 9), (0, *GONE, 9), (2, *RIGHT, 2)], Passage(2)),
    ([(2, *LEFT, 4), (1, *TOP, 1), (2, *LEFT, 4), (0, *GONE, 9), (2, *RIGHT, 4)], Passage(2, 2, 9)),
    # the first passage counts
    ([(2, *LEFT, 4), (0, *GONE, 9), (2, *RIGHT, 4), (0, *GONE, 9), (5, *LEFT, 4)],
     Passage(2, 2, 9)),
  ],
)  # fmt: skip
def test_the_first_passage_is_found(parts, expected):
  assert find_passage(*path(*parts)) == expected


def test_shares_and_chance():
  """Chance is what dealing out the same colours would give, and is high where they are few."""
  passages = [Passage(0, 0, 14), Passage(0, 1, 14), Passage(1, 1, 5), Passage(0, 0, 15), Passage(3)]
  result = summarise(passages, hidden=12)
  assert result["returned"] == 0.8 and result["agree"] == 0.75 and result["early"] == 0.25
  assert result["chance"] == pytest.approx((3 / 4) * (2 / 4) + (1 / 4) * (2 / 4))
  assert result["unseen"] == 12
  assert list(result["colours"].values()) == pytest.approx([0.6, 0.2, 0, 0.2, 0, 0])
  one = summarise([Passage(2, 2, 14)] * 3, hidden=12)
  assert (one["agree"], one["chance"]) == (1, 1)
  assert summarise([Passage()], hidden=12)["returned"] == 0


def test_the_table_has_columns_for_it(clips, tmp_path):
  gone = clips[:2].copy()
  gone[:, MIDDLE:] = GROUND
  results = {
    "data": shapes_truth.measure(clips[:2], CAPTIONS[:2], WORLD),
    "gone": shapes_truth.measure(gone, CAPTIONS[:2], WORLD),
  }
  head, _, *rows = (
    line.strip("| ").split(" | ") for line in report.format_table(results).split("\n")
  )
  assert head[-4:] == ["came back", "same colour", "by chance", "frames unseen"]
  assert rows[0][-4:-1] == ["100%", "100%", "50%"]
  assert rows[1][-4:] == ["0%", "–", "–", "–"]
  assert report.plot(results, tmp_path / "fifths.png").stat().st_size > 10_000


def test_the_line_of_a_run_says_it(clips):
  gone = clips.copy()
  gone[:4, MIDDLE:] = GROUND
  line = shapes_line(shapes_truth.measure(gone, CAPTIONS, WORLD))
  end = r"; came back 33.3%, same colour 100.0% \(by chance 50.0%\), after \d\d\.\d frames unseen"
  assert re.search(end + "$", line), line
  gone[:, MIDDLE:] = GROUND
  line = shapes_line(shapes_truth.measure(gone, CAPTIONS, WORLD))
  assert line.endswith("; came back 0.0%, same colour - (by chance -), after - frames unseen")
  assert "came back" not in shapes_line(of_true_clips(WorldConfig(), clips=1, frames=5))


def test_a_passage_is_that_of_a_world_with_a_screen_alone():
  world = WorldConfig()
  result = of_true_clips(world, clips=1, frames=5)
  assert "passage" not in result
  assert "came back" not in report.format_table({"data": result})


def test_the_reference_is_of_clips_that_pass():
  result = of_true_clips(WORLD, clips=4, frames=WORLD.frames)
  assert (result["passage"]["returned"], result["passage"]["agree"]) == (1, 1)
  shown = {tuple(DIRECTIONS[p["prompt"].split()[-1]]) for p in result["prompts"]}
  assert len(shown) > 1 and not any(
    set(p["prompt"].split()) & set(COLOURS) for p in result["prompts"]
  )
