"""What a part of the data stands for all of it: clips of a folder lie in an order."""

import json

import jax
import numpy as np
import pytest

from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.data import pipeline
from hiar_jax.training import prepared_data, samples, stages
from hiar_jax.training.run import Run
from tests.helpers import tiny_run
from tests.helpers.tiny_run import make_run

RED, BLUE = (200, 40, 40), (40, 60, 230)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
  """Sixteen clips, the first half red, of which few are fitted on and few become trajectories."""
  place = tmp_path_factory.mktemp("spread")
  tiny_run.write_clips(place / "clips", 16, (RED, BLUE))
  videos = {"data__source": "videos", "data__folder": str(place / "clips")}
  run = make_run(place / "run", **videos, sample__count=2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepared_data, "CLIPS", 4)
    stages.prepare_data(run)
  return run


def colours(captions) -> list[str]:
  return [caption.split()[1] for caption in captions]


def test_spread_items():
  assert pipeline.spread("abcdefgh", 4) == list("aceg")
  assert pipeline.spread("abc", 5) == list("abc")


def test_the_codec_is_fitted_on_clips_from_all_over(run):
  for rgb in (RED, BLUE):
    video = np.broadcast_to(np.asarray(rgb, np.uint8), (1, 4, 16, 16, 3))
    [back] = run.autoencoder.pieces(run.autoencoder.latents(video))
    assert np.abs(back.astype(int) - video).mean() < 8


def test_a_codec_of_large_clips_is_fitted_on_some_from_all_over(tmp_path, monkeypatch):
  clips = np.stack([np.full((1, 8, 8, 3), level, np.uint8) for level in (0, 50, 200, 250)])
  monkeypatch.setattr(patch_pca, "FIT_NUMBERS", 2 * clips[0].size)
  config = PatchPCAConfig(patch=8, channels=1)
  config.fit(tmp_path, lambda: clips)
  mean = config.open(tmp_path).mean
  np.testing.assert_allclose(mean, (0 + 200) / 2 / 127.5 - 1, atol=1e-6)


def test_previews_and_samples_show_prompts_from_all_over(run):
  assert set(colours(run.preview_prompts())) == {"0", "1"}
  assert colours(samples.read_prompts(run)) == ["0", "1"]


@pytest.fixture
def made(run, monkeypatch):
  """() -> the captions of the trajectories, made without a teacher."""
  monkeypatch.setattr(stages.pretrained, "load_teacher", lambda run: None)

  def sample(params, texts, seeds, starts):
    levels = len(run.experiment.student.timesteps) + 1
    return np.zeros((len(texts), levels, *run.experiment.latent.clip), np.float32)

  monkeypatch.setattr(Run, "teacher_sampler", lambda run, key: sample)

  def make():
    with jax.set_mesh(run.mesh):
      stages.sample_trajectories(run)
    return pipeline.read_captions(run.directory("trajectories"))

  return make


def test_trajectories_are_of_clips_from_all_over(run, made):
  captions = made()
  assert len(set(captions)) == len(captions) == 8
  assert 2 <= colours(captions).count("0") <= 6
  assert made() == captions  # complete


def test_those_that_an_earlier_version_began_go_on_in_their_order(run, made):
  directory = run.directory("trajectories")
  made()
  recipe = json.loads((directory / "recipe.json").read_text())
  assert recipe.pop("clips") == "shuffled"
  for path in directory.iterdir():
    if path.is_dir():
      path.rename(run.workdir / f"old_{path.name}")
  (directory / "recipe.json").write_text(json.dumps(recipe))
  assert made() == pipeline.read_captions(run.directory("data"))[:8]


def test_a_generated_world_is_taken_as_it_comes(tmp_path):
  run = make_run(tmp_path)
  assert not stages._shuffles(run)
  np.testing.assert_array_equal(stages._clip_order(run, 5), range(5))
