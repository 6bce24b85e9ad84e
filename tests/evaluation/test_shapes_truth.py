"""Each fault of a video lowers its own number and no other; a true clip scores full marks."""

import json

import numpy as np
import pytest

from hiar_jax.data import shapes_world
from hiar_jax.data.shapes_world import DIRECTIONS, Scene, Shape, WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.evaluation import report, shapes_truth

PLAIN, TEXTURED = WorldConfig(), WorldConfig(difficulty="textured")
RATES = ("recognised", "colour", "shape", "background", "direction")


def shape(config, colour, form, direction, speed, x, y):
  velocity = np.asarray(DIRECTIONS[direction]) * config.speed(speed)
  return Shape(colour, form, direction, speed, (x, y), tuple(velocity), config.radius)


SCENES = [
  Scene((shape(PLAIN, "red", "circle", "left", "", 20.0, 12.3),), "plain", 32),
  Scene((shape(PLAIN, "yellow", "triangle", "down", "quickly", 9.0, 7.0),), "plain", 32),
  Scene((shape(PLAIN, "blue", "square", "up", "slowly", 20.5, 26.5),), "plain", 32),
]
PAIR = Scene(
  (
    shape(TEXTURED, "green", "circle", "right", "", 7.0, 15.0),
    shape(TEXTURED, "magenta", "square", "left", "", 25.0, 16.0),
  ),
  "checkered",
  32,
)
CAPTIONS = [shapes_world.caption(scene) for scene in SCENES]


def draw(scene, config=PLAIN, frames=36):
  under = shapes_world.background_image(scene.background, config)
  return shapes_world.render(shapes_world.simulate(scene, frames), under, config)


@pytest.fixture(scope="module")
def clips():
  return np.stack([draw(scene) for scene in SCENES])


def totals(result):
  return {name: result[name]["total"] for name in (*RATES, "motion_ratio", "jumps", "error")}


def assert_perfect_but(result, *faults):
  for name in RATES:
    if name not in faults:
      assert result[name]["total"] == 1, name
  if "motion_ratio" not in faults:
    assert result["motion_ratio"]["total"] == pytest.approx(1, abs=0.05)
  if "jumps" not in faults:
    assert result["jumps"]["total"] == 0
  if "error" not in faults:
    assert result["error"]["total"] < 2e-5


def test_true_clips_score_full_marks(clips):
  result = shapes_truth.measure(clips, CAPTIONS, PLAIN)
  assert_perfect_but(result)
  for name in ("recognised", "colour", "shape", "background"):
    assert result[name]["fifths"] == [1] * 5
  assert result["error_last_over_first"] == pytest.approx(1, abs=0.1)
  assert [row["prompt"] for row in result["prompts"]] == CAPTIONS
  assert [row["motion"] for row in result["prompts"]] == pytest.approx([2.09, 2.57, 1.5], abs=0.06)
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_float_and_bytes_measure_the_same(clips):
  measured = [
    shapes_truth.measure(x, CAPTIONS[:1], PLAIN) for x in (clips[:1], clips[:1] / 127.5 - 1)
  ]
  for name, value in totals(measured[0]).items():
    assert value == pytest.approx(totals(measured[1])[name], rel=1e-3), name


def test_a_still_clip_has_no_motion_and_no_direction(clips):
  result = shapes_truth.measure(np.repeat(clips[:, :1], 36, 1), CAPTIONS, PLAIN)
  assert_perfect_but(result, "motion_ratio", "direction")
  assert result["direction"]["total"] == 0 and result["motion"]["total"] < 0.01


def test_trembling_in_place_is_no_direction(clips):
  trembling = np.tile(clips[:, :2], (1, 18, 1, 1, 1))
  assert shapes_truth.measure(trembling, CAPTIONS, PLAIN)["direction"]["total"] == 0


def test_trembling_at_a_wall_is_no_bounce():
  scenes = [
    Scene((shape(PLAIN, "red", "circle", "left", "slowly", x, 16.0),), "plain", 32)
    for x in (6.5, 5.5)
  ]
  at = [draw(scene, frames=1) for scene in scenes]
  trembling = np.tile(np.concatenate(at), (18, 1, 1, 1))[None]
  assert (
    shapes_truth.measure(trembling, ["a red circle moving left slowly"], PLAIN)["direction"][
      "total"
    ]
    == 0
  )


def test_a_turn_in_the_open_is_no_bounce(clips):
  turning = np.concatenate([clips[:1, :4], clips[:1, 2::-1], clips[:1, :1].repeat(29, 1)], 1)
  assert shapes_truth.measure(turning, CAPTIONS[:1], PLAIN)["direction"]["total"] == 0


@pytest.mark.parametrize(
  "fault, old, new",
  [
    ("colour", "red", "green"),
    ("shape", "circle", "square"),
    ("direction", "left", "right"),
    ("direction", "left", "up"),
  ],
)
def test_one_wrong_word_lowers_one_number(clips, fault, old, new):
  prompts = [CAPTIONS[0].replace(old, new), *CAPTIONS[1:]]
  result = shapes_truth.measure(clips, prompts, PLAIN)
  assert_perfect_but(result, fault)
  assert result[fault]["total"] == pytest.approx(2 / 3)
  assert [row[fault] for row in result["prompts"]] == [0, 1, 1]


def test_a_wrong_speed_shows_in_the_ratio_alone(clips):
  result = shapes_truth.measure(clips[:1], [CAPTIONS[0] + " quickly"], PLAIN)
  assert_perfect_but(result, "motion_ratio")
  assert result["motion_ratio"]["total"] == pytest.approx(
    shapes_world.SPEEDS[""] / shapes_world.SPEEDS["quickly"], abs=0.04
  )


def test_vanishing_is_wrong_from_then_on(clips):
  empty = np.rint(255 * shapes_world.background_image("plain", PLAIN)).astype(np.uint8)
  gone = clips.copy()
  gone[:, 22:] = empty  # the last two fifths of 36 frames
  result = shapes_truth.measure(gone, CAPTIONS, PLAIN)
  assert_perfect_but(result, "recognised", "colour", "shape", "error")
  for name in ("recognised", "colour", "shape"):
    assert result[name]["fifths"] == [1, 1, 1, 0, 0]
  assert result["motion"]["fifths"][3:] == [None, None]
  assert result["error_last_over_first"] > 1000


def test_dissolving_raises_the_error_before_the_shape_is_lost(clips):
  empty = 2 * shapes_world.background_image("plain", PLAIN) - 1
  strength = np.linspace(1, 0, 36)[:, None, None, None]
  result = shapes_truth.measure(empty + strength * (clips / 127.5 - 1 - empty), CAPTIONS, PLAIN)
  recognised, error = result["recognised"]["fifths"], result["error"]["fifths"]
  assert recognised[:2] == [1, 1] and recognised[-1] == 0
  assert np.all(np.diff(error) > 0)
  assert result["drift"]["saturation"]["slope"] < 0


def test_noise_shows_nothing(clips):
  noise = np.random.default_rng(0).uniform(-1, 1, clips.shape)
  result = shapes_truth.measure(noise, CAPTIONS, PLAIN)
  assert totals(result) | {"error": 0} == {
    **dict.fromkeys(RATES, 0),
    "background": result["background"]["total"],
    "motion_ratio": None,
    "jumps": None,
    "error": 0,
  }
  json.dumps(result, allow_nan=False)


def test_a_second_copy_is_no_true_rendering(clips):
  twice = np.maximum(clips, clips[:, :, ::-1, ::-1])
  assert shapes_truth.measure(twice[1:2], CAPTIONS[1:2], PLAIN)["recognised"]["total"] < 0.5


def test_jumps_are_counted_and_are_no_motion(clips):
  jumping = clips[:1].copy()
  # seen through a point reflection: one leap, then the same speed
  jumping[:, 18:] = jumping[:, 18:, ::-1, ::-1]
  result = shapes_truth.measure(jumping, CAPTIONS[:1], PLAIN)
  assert_perfect_but(result, "jumps")
  assert result["jumps"]["total"] == pytest.approx(1 / 35)


def test_a_bounce_within_the_first_clip_does_not_turn_the_direction():
  scene = Scene(
    (
      shape(
        PLAIN, "red", "circle", "left", "quickly", 5.5 + shapes_world.SPEEDS["quickly"] * 3, 16.0
      ),
    ),
    "plain",
    32,
  )
  result = shapes_truth.measure(
    draw(scene)[None], [shapes_world.caption(scene)], PLAIN, train_frames=12
  )
  # a single clip meets the walls as often as it happens to
  assert_perfect_but(result, "motion_ratio")
  reversed_clip = draw(scene)[None, 4:]
  assert (
    shapes_truth.measure(reversed_clip, [shapes_world.caption(scene)], PLAIN)["direction"]["total"]
    == 0
  )


def test_a_turn_within_a_step_is_a_turn():
  """Half of the third step leads to the wall, half of it back: that step is nothing, the next ones
  lead away.
  """
  speed = shapes_world.SPEEDS["quickly"]
  scene = Scene(
    (shape(PLAIN, "red", "circle", "right", "quickly", 26.5 - 2.5 * speed, 16.0),), "plain", 32
  )
  assert (
    shapes_truth.measure(draw(scene)[None], [shapes_world.caption(scene)], PLAIN, train_frames=9)[
      "direction"
    ]["total"]
    == 1
  )


def test_a_wrong_start_is_not_saved_by_a_later_bounce():
  scene = Scene(
    (
      shape(
        PLAIN, "red", "circle", "right", "quickly", 26.5 - shapes_world.SPEEDS["quickly"] * 2, 16.0
      ),
    ),
    "plain",
    32,
  )
  prompt = shapes_world.caption(scene).replace(
    "right", "left"
  )  # most frames of the clip do move left
  assert shapes_truth.measure(draw(scene)[None], [prompt], PLAIN)["direction"]["total"] == 0


def test_a_wrong_background_is_its_own_number():
  videos = draw(PAIR, TEXTURED)[None]
  result = shapes_truth.measure(
    videos, [shapes_world.caption(PAIR).replace("checkered", "striped")], TEXTURED
  )
  assert result["background"]["total"] == 0 and result["error"]["total"] > 0.01


def test_two_true_shapes_that_cross_score_full_marks():
  result = shapes_truth.measure(draw(PAIR, TEXTURED)[None], [shapes_world.caption(PAIR)], TEXTURED)
  assert_perfect_but(result)
  assert result["hidden"]["total"] > 0.05


def test_a_prompt_of_two_shapes_in_the_other_order_is_the_same_prompt():
  green, magenta = PAIR.shapes
  prompt = shapes_world.caption(Scene((magenta, green), "checkered", 32))
  assert_perfect_but(shapes_truth.measure(draw(PAIR, TEXTURED)[None], [prompt], TEXTURED))


def test_shapes_without_colours_are_told_apart_by_where_they_were():
  prompt = "a circle moving right and a circle moving left on a checkered background"
  scene = Scene(
    (
      shape(TEXTURED, "green", "circle", "right", "", 7.0, 13.0),
      shape(TEXTURED, "magenta", "circle", "left", "", 25.0, 19.0),
    ),
    "checkered",
    32,
  )
  result = shapes_truth.measure(draw(scene, TEXTURED)[None], [prompt], TEXTURED)
  assert result["jumps"]["total"] == 0 and result["motion_ratio"]["total"] == pytest.approx(
    1, abs=0.05
  )


def test_a_start_behind_another_shape_is_not_judged():
  scene = Scene(
    (
      shape(TEXTURED, "green", "circle", "right", "slowly", 8.0, 16.0),
      shape(TEXTURED, "magenta", "square", "right", "", 8.0, 16.0),
    ),
    "checkered",
    32,
  )
  result = shapes_truth.measure(
    draw(scene, TEXTURED, 18)[None], [shapes_world.caption(scene)], TEXTURED
  )
  assert result["hidden"]["fifths"][0] == 0.5  # the circle, in every frame
  assert_perfect_but(result, "motion_ratio")


def test_one_of_two_shapes_missing_is_half_wrong():
  alone = Scene(PAIR.shapes[:1], "checkered", 32)
  result = shapes_truth.measure(draw(alone, TEXTURED)[None], [shapes_world.caption(PAIR)], TEXTURED)
  for name in ("recognised", "colour", "shape", "direction"):
    assert result[name]["total"] == pytest.approx(0.5, abs=0.05), name


def test_exchanged_colours_are_two_wrong_shapes_or_two_wrong_colours():
  prompt = (
    shapes_world.caption(PAIR)
    .replace("green", "x")
    .replace("magenta", "green")
    .replace("x", "magenta")
  )
  result = shapes_truth.measure(draw(PAIR, TEXTURED)[None], [prompt], TEXTURED)
  assert (
    result["recognised"]["total"] == 1
    and result["colour"]["total"] == 1
    and result["shape"]["total"] == 0
  )


def test_what_a_prompt_does_not_say_is_not_judged(clips):
  result = shapes_truth.measure(clips[:2], ["a red thing", "hello"], PLAIN)
  assert result["colour"]["total"] == 1 and result["shape"]["total"] is None
  assert result["direction"]["total"] is None and result["motion_ratio"]["total"] is None
  assert result["motion"]["total"] > 1


@pytest.mark.parametrize("config", [PLAIN, TEXTURED, WorldConfig(size=48)])
def test_true_clips_are_perfect(config):
  clips, captions = shapes_truth.true_clips(config, clips=2, frames=18, seed=3)
  result = shapes_truth.measure(clips, captions, config)
  assert_perfect_but(result, "motion_ratio")
  assert result["motion_ratio"]["total"] == pytest.approx(1, abs=0.1)
  assert result["relative_error"]["q100"] < 0.001


def test_true_clips_through_a_codec_measure_the_codec():
  noise = np.random.default_rng(0).normal(0, 0.05, (2, 9, 32, 32, 3))
  clips, captions = shapes_truth.true_clips(PLAIN, clips=2, frames=9)
  result = shapes_truth.measure(clips / 127.5 - 1 + noise, captions, PLAIN)
  assert result["error"]["total"] == pytest.approx(0.05**2, rel=0.05)
  assert_perfect_but(result, "error", "motion_ratio")


def test_expected_motion_is_the_mean_of_true_clips():
  for word, speed in shapes_world.SPEEDS.items():
    start = np.random.default_rng(0).uniform(5.5, 26.5, 200)
    clips = [
      shapes_world.simulate(
        Scene((shape(PLAIN, "red", "circle", "right", word, x, 16.0),), "plain", 32), 50
      )
      for x in start
    ]
    steps = np.concatenate(
      [np.linalg.norm(np.diff(clip.position, axis=0), axis=-1) for clip in clips]
    )
    assert shapes_truth.expected_motion(speed, PLAIN) == pytest.approx(steps.mean(), rel=0.005)


def test_bad_input_is_one_line(clips):
  for videos, prompts in ((clips, CAPTIONS[:2]), (clips[:0], []), (clips[:, :4], CAPTIONS)):
    with pytest.raises(UserError) as error:
      shapes_truth.measure(videos, prompts, PLAIN)
    assert "\n" not in str(error.value)


def test_table_and_figure(clips, tmp_path):
  gone = clips.copy()
  gone[:, 10:] = 0
  results = {
    "data": shapes_truth.measure(clips, CAPTIONS, PLAIN),
    "gone": shapes_truth.measure(gone, CAPTIONS, PLAIN),
  }
  lines = report.format_table(results).splitlines()
  assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
  cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
  assert cells[:4] == ["data", "100.0%", "100.0%", "100%"]
  path = report.plot(results, tmp_path / "fifths.png")
  assert path.stat().st_size > 10_000
