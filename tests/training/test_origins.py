"""What a run's weights hang on lies with the run: changed data and weights under it are refused,
and the data set itself may go.
"""

import json
import shutil

import numpy as np
import pytest

from experiments import wan_framepack
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.training import stages
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.origins import Origins
from hiar_jax.training.run import open_run, read_config
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_run
from tests.helpers.small_weights import CONFIG, PARAMS

PROMPT = "a red disc that drifts"


def clip(folder, name: str, caption: str, seed: int) -> None:
  """Eight frames of large random patches, two clips."""
  folder.mkdir(parents=True, exist_ok=True)
  patches = np.random.default_rng(seed).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
  write_mp4(folder / f"{name}.mp4", patches.repeat(8, axis=1).repeat(8, axis=2), fps=8)
  (folder / f"{name}.txt").write_text(caption)


def open_own(place, workdir="run", **changes):
  folder = str(place / "clips")
  own = {"data__source": "videos", "data__folder": folder, "data__fps": 8.0}
  return tiny_run.make_run(place / workdir, **own, **changes)


def prepare(place, workdir="run", **changes):
  run = open_own(place, workdir, **changes)
  stages.prepare_data(run)
  return run


def train(place, workdir="run") -> None:
  (place / workdir / "teacher" / "checkpoints" / "2").mkdir(parents=True)


def seen(run):
  """The ids and the text of a prompt, and what its latents mean."""
  tokens = run.text_encoder.tokens([PROMPT])
  text = run.text_encoder.embed(tokens)
  return [tokens, np.asarray(text), np.asarray(run.autoencoder.basis)]


def assert_same(a, b) -> None:
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def place(tmp_path):
  for i in range(4):
    clip(tmp_path / "clips", f"c{i}", PROMPT if i % 2 else "one blue square which slides", i)
  prepare(tmp_path)
  return tmp_path


def test_data_that_are_made_anew_from_other_clips_are_refused(place):
  train(place)
  before = tiny_run.files(place / "run" / "origins")
  clip(place / "clips", "d", "above a red disc", 9)
  prepare(place)  # what lies there is used, and it is said
  shutil.rmtree(place / "run" / "data")
  for _ in range(2):  # once the new data are made, and at once
    with pytest.raises(UserError, match="words.json is not the one that .* use another --workdir"):
      prepare(place)
  assert tiny_run.files(place / "run" / "origins") == before


def test_the_same_words_with_another_codec_are_refused(place):
  train(place)
  clip(place / "clips", "c0", "one blue square which slides", 77)
  shutil.rmtree(place / "run" / "data")
  with pytest.raises(UserError, match="codec.npz is not the one that .* the data has changed"):
    prepare(place)


def test_the_same_data_made_anew_go_on(place):
  """Also where another machine has rounded the codec otherwise: the run's own one is used."""
  train(place)
  before = seen(open_own(place))
  shutil.rmtree(place / "run" / "data")
  assert_same(seen(prepare(place)), before)
  codec = place / "run" / "data" / "codec.npz"
  with np.load(codec) as stored:
    arrays = dict(stored)
  np.savez(codec, **{**arrays, "basis": arrays["basis"] * np.float32(1 + 1e-6)})
  assert_same(seen(prepare(place)), before)


def test_a_run_that_is_not_trained_takes_the_new_data(place):
  before = seen(open_own(place))
  clip(place / "clips", "d", "above a red disc", 9)
  shutil.rmtree(place / "run" / "data")
  run = prepare(place)
  assert run.text_encoder.vocabulary[0] == "a" and run.text_encoder.vocabulary[1] == "above"
  assert (seen(run)[0] != before[0]).any()
  assert_same(seen(open_own(place)), seen(run))


def test_it_is_used_without_its_data(place):
  before = seen(open_own(place))
  shutil.rmtree(place / "run" / "data")
  shutil.rmtree(place / "clips")
  config = read_config(place / "run")
  assert_same(seen(open_run(config, place / "run", save=False)), before)


def test_a_run_of_an_earlier_version_goes_on_and_keeps_them(place):
  train(place)
  before = seen(open_own(place))
  shutil.rmtree(place / "run" / "origins")
  (place / "run" / "data" / "words.json").unlink()
  assert_same(seen(open_own(place)), before)
  assert_same(seen(prepare(place)), before)
  names = {path.name for path in (place / "run" / "origins").iterdir()}
  assert names == {"words.json", "codec.npz", "weights.json"}


def test_who_borrows_the_data_keeps_what_it_was_trained_with(place):
  borrower = prepare(place, "second", stages_from=str(place / "run"))
  before = seen(borrower)
  assert not (place / "second" / "data").exists()
  (place / "second" / "distill" / "checkpoints" / "2").mkdir(parents=True)
  clip(place / "clips", "d", "above a red disc", 9)
  shutil.rmtree(place / "run" / "data")
  prepare(place)  # it is not trained yet
  with pytest.raises(UserError, match="words.json is not the one that .*second was trained with"):
    prepare(place, "second", stages_from=str(place / "run"))
  config = read_config(place / "second")
  assert_same(seen(open_run(config, place / "second", save=False)), before)


def test_who_made_a_stage_must_have_been_trained_with_the_data_of_now(place):
  """The causal init of `second` was trained with words that the data of `run` no longer has."""
  prepare(place, "second", stages_from=str(place / "run"), causal_init__steps=3)
  tiny_run.pretend(place / "second", "causal_init", 3)
  clip(place / "clips", "d", "above a red disc", 9)
  shutil.rmtree(place / "run" / "data")
  prepare(place)  # it is not trained yet
  given = {"stages_from": str(place / "second")}
  with pytest.raises(UserError, match="words.json is not the one that .*second was trained with"):
    prepare(place, "third", causal_init__steps=3, **given)
  prepare(place, "fourth", causal_init__steps=4, **given)  # of it nothing is taken
  assert open_own(place, "fourth").text_encoder.vocabulary[1] == "above"
  train(place)
  clip(place / "clips", "e", "beneath a red disc", 9)
  shutil.rmtree(place / "run" / "data")
  with pytest.raises(UserError, match="words.json is not the one that .*run was trained with"):
    prepare(place)
  with pytest.raises(UserError, match="words.json is not the one that .*run was trained with"):
    prepare(place, "fifth", stages_from=str(place / "run"))


@pytest.mark.parametrize(
  ("name", "kind", "stage"),
  [
    ("weights.base", "dit", "teacher"),
    ("weights.teacher", "dit", "distill"),
    ("weights.student", "dit", "causal_init"),
    ("codec.weights", "vae", "data"),
    ("text.weights", "umt5", "data"),
  ],
)
def test_weights_that_are_converted_anew_are_refused(tmp_path, name, kind, stage):
  weights.save(tmp_path / "weights", kind, CONFIG, PARAMS)
  config = wan_framepack.get_config()
  config.weights = {"base": str(tmp_path / "none"), "teacher": "", "student": ""}
  group, field = name.split(".")
  config[group][field] = str(tmp_path / "weights")
  origins = Origins(build(Experiment, config), tmp_path / "run", (tmp_path / "run" / "data",))
  origins.keep()
  kept = json.loads((tmp_path / "run" / "origins" / "weights.json").read_text())
  assert list(kept) == [name]
  weights.save(tmp_path / "weights", kind, CONFIG, {**PARAMS, "gain": np.float32(2.5)})
  origins.check()  # nothing hangs on them yet
  (tmp_path / "run" / "trajectories").mkdir()
  with pytest.raises(UserError, match=f"{name}: these are other weights .*{kept.popitem()[1]}"):
    origins.check()
  with pytest.raises(UserError, match=f"{name}: these are other weights"):
    origins.check((stage,))
  origins.check(tuple({"data", "teacher", "causal_init"} - {stage}))  # of which others are taken
  weights.save(tmp_path / "weights", kind, CONFIG, PARAMS)
  origins.check()
  shutil.rmtree(tmp_path / "weights")
  origins.check()  # a finished run may do without
