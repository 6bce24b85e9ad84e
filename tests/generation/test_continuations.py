"""A video that is continued again and again keeps its colours."""

import numpy as np
import pytest

from hiar_jax import generate
from hiar_jax.components import patch_pca
from hiar_jax.training.run import open_run
from hiar_jax.video import mp4
from tests.helpers import tiny_run
from tests.helpers.untrained import PROMPT, compiles_quickly, saved_run  # noqa: F401
from tests.helpers.video_reader import read_mp4

ROUNDS, FIRST, MORE, SCALE = 20, 8, 2, 8


def film() -> np.ndarray:
  """Frames uint8 [FIRST 16 16 3] of soft colours that move a little."""
  y, x = np.mgrid[:16, :16]
  rows = []
  for i in range(FIRST):
    waves = [90 * np.sin(x / 4 + i / 9), 90 * np.cos(y / 3), 80 * np.sin((x + y) / 5 - i / 7)]
    rows.append(128 + np.stack(waves, -1))
  return np.rint(rows).astype(np.uint8)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  """(videos by round, as they are read; passed(frames, times): what passes through the codec and a
  file make of frames by themselves).
  """
  place, config = tmp_path_factory.mktemp("chain"), tiny_run.make_config()
  workdir = saved_run(place / "run", config)
  run = open_run(config, workdir, save=False)
  codec = patch_pca.fit(film()[None], run.experiment.codec)
  patch_pca.save(run.directory("data") / patch_pca.FILE, codec)
  path = mp4.write_mp4(place / "0.mp4", film(), 8, scale=SCALE)
  videos = [read_mp4(path, scale=SCALE)[0]]
  for k in range(1, ROUNDS + 1):
    options = {"video": str(path), "frames": FIRST + MORE * k, "seed": k, "prompt": PROMPT}
    path = place / f"{k}.mp4"
    told = generate.GenerateOptions(workdir=str(workdir), out=str(path), **options)
    generate.generate(told)
    videos.append(read_mp4(path, scale=SCALE)[0])

  def passed(frames, times):
    for _ in range(times):
      frames = run.pixels(run.autoencoder.latents(frames[None]))[0]
      again = mp4.write_mp4(place / "alone.mp4", frames, 8, scale=SCALE)
      frames = read_mp4(again, scale=SCALE)[0]
    return frames

  return videos, passed


def change(a, b) -> np.ndarray:
  return a.astype(int) - b.astype(int)


@pytest.mark.slow
def test_twenty_continuations_change_what_they_keep_as_little_as_writing_it_does(chain):
  """20 generations of a file, each kept as it is: the mean change of the first frames is at most
  what the codec and H.264 lose by themselves as often, and no colour moves further.
  """
  videos, passed = chain
  assert [len(video) for video in videos] == [FIRST + MORE * k for k in range(ROUNDS + 1)]
  after, lost = change(videos[-1][:FIRST], film()), change(passed(videos[0], ROUNDS), film())
  assert np.abs(after).mean() <= np.abs(lost).mean() + 0.1, np.abs((after, lost)).mean((1, 2, 3, 4))
  colours = after.mean((0, 1, 2)) - lost.mean((0, 1, 2))
  assert np.abs(colours).max() <= 0.5, colours


@pytest.mark.slow
def test_no_round_leaves_a_step_at_its_seam(chain):
  """Frames of one age beside those of another: what each round made is as bright as the codec and
  H.264 leave it by themselves, the oldest as the latest, so that where two meet nothing has moved
  apart.
  """
  videos, passed = chain
  for k in (1, 2, 7, 13, 19):
    made = slice(FIRST + MORE * (k - 1), FIRST + MORE * k)
    alone = passed(videos[k][made], ROUNDS - k)
    apart = change(videos[-1][made], alone).mean((0, 1, 2))
    assert np.abs(apart).max() <= 1, (k, apart)  # alone, H.264 codes them a little otherwise
