"""A packed model that is given a first frame: true ones in the sample stage, which are not measured
as if it had made them.
"""

import types

import numpy as np
import pytest

from hiar_jax.config.building import build
from hiar_jax.data import shapes_described
from hiar_jax.errors import UserError
from hiar_jax.evaluation import shapes_truth
from hiar_jax.training import pretrained, samples, stages
from hiar_jax.training import run as runs
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_packed
from tests.helpers.untrained import PROMPT, compiles_quickly, untrained  # noqa: F401
from tests.helpers.video_reader import read_mp4

PROMPTS = [PROMPT, "a blue square moving up", "a green triangle moving down"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  config = tiny_packed.make_config("shapes_framepack_inverted")
  return untrained(tmp_path_factory.mktemp("inverted"), config)


def test_clips_are_the_given_frame_and_whole_sections():
  e = build(Experiment, tiny_packed.make_config("shapes_framepack_inverted"))
  assert (e.given, e.latent.frames, e.framepack.sections(e.latent.frames)) == (1, 7, 3)
  assert build(Experiment, tiny_packed.make_config()).given == 0
  with pytest.raises(UserError, match="2 frames after framepack.given = 1; the nearest is 9"):
    build(Experiment, tiny_packed.make_config("shapes_framepack_inverted", data__frames=8))


@pytest.mark.slow
def test_videos_start_from_true_frames(model):
  """Each from that of its prompt and seed, whatever else is in the batch."""
  run = model.run
  videos = samples.make_videos(run, model.params(), PROMPTS, 5, seed=4)
  assert videos.shape == (3, 5, 16, 16, 3)
  for i, prompt in enumerate(PROMPTS):
    true = shapes_described.true_video(prompt, 4 + i, run.world, 1)
    np.testing.assert_array_equal(videos[i, :1], run.pixels(run.autoencoder.latents(true[None]))[0])
  one = samples.make_videos(run, model.params(), PROMPTS[1:2], 5, seed=5)
  assert np.abs(one[0].astype(int) - videos[1]).max() <= 1
  assert samples.long_frames(run) == 25  # four times three sections, and the given frame


def test_what_is_given_is_not_measured(model, monkeypatch):
  run, seen, numbers = model.run, [], np.arange(25, dtype=np.uint8)[:, None, None, None]
  make = lambda run, params, prompts, frames, seed, name="": np.broadcast_to(
    numbers[:frames], (len(prompts), frames, 16, 16, 3)
  )
  monkeypatch.setattr(samples, "make_videos", make)
  monkeypatch.setattr(pretrained, "load_weights", lambda run, stage: None)
  monkeypatch.setattr(samples, "shapes_line", lambda metrics: "")
  measure = lambda videos, prompts, *_: seen.append((videos, prompts)) or {}
  monkeypatch.setattr(shapes_truth, "measure", measure)
  stages.make_samples(run)
  row = samples.without_given(run, None, PROMPTS, 24, 0, "a row of evaluate")
  for videos, prompts in (*seen, (row, PROMPTS)):
    assert videos.shape == (len(prompts), 24, 16, 16, 3)
    assert videos[0, :, 0, 0, 0].tolist() == [*range(1, 25)]
  saved = sorted((run.directory("sample")).glob("*.mp4"))
  assert len(saved) == 3 and all(len(read_mp4(path)[0]) == 25 for path in saved)


@pytest.mark.slow
def test_previews_start_from_true_frames_too(model):
  preview = stages._student_preview(model.run)(types.SimpleNamespace(ema=model.params()))
  assert preview.shape == (8, 7, 16, 16, 3)


def test_of_other_data_the_clip_of_the_caption_begins_the_video(model, monkeypatch):
  clips = np.random.default_rng(0).integers(0, 255, (3, 7, 16, 16, 3), np.uint8)
  monkeypatch.setattr(runs.Run, "source", types.SimpleNamespace(world=None))
  monkeypatch.setattr(samples.pipeline, "read_captions", lambda directory: PROMPTS)
  opened = [{"video": clip} for clip in clips]
  monkeypatch.setattr(samples.tfds_builder, "open_source", lambda directory: opened)
  (starts,) = samples.true_starts(model.run, PROMPTS[::-1], [0, 1, 2])
  np.testing.assert_array_equal(starts, model.run.autoencoder.latents(clips[::-1, :1]))
  with pytest.raises(UserError, match="'a star' is no caption of the data, whose clips the videos"):
    samples.true_starts(model.run, ["a star"], [0])
  assert samples.given_pixels(model.run) == 1


def test_a_model_that_is_given_nothing_starts_from_nothing(tmp_path):
  run = untrained(tmp_path, tiny_packed.make_config()).run
  assert samples.true_starts(run, PROMPTS, [0, 1, 2]) == () and samples.given_pixels(run) == 0


def test_prompts_of_a_file_have_no_first_frame(tmp_path):
  (tmp_path / "p.txt").write_text("a red circle\n")
  (tmp_path / "clips").mkdir()
  changes = dict(data__source="videos", data__folder=str(tmp_path / "clips"))
  changes |= dict(teacher__batch=8, framepack__batch=8)  # eight devices
  config = tiny_packed.make_config(
    "shapes_framepack_inverted", sample__prompts=str(tmp_path / "p.txt"), **changes
  )
  with pytest.raises(UserError, match="starts from framepack.given = 1 frames, which prompts of a"):
    runs.open_run(config, tmp_path / "run")
