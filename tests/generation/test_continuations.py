"""A video that is continued again and again keeps its colours."""

import numpy as np
import pytest

from hiar_jax import generate
from hiar_jax.video import conditioning_files, mp4
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
  """(videos by round, as they are read; the first frames after as many writings alone)."""
  place = tmp_path_factory.mktemp("chain")
  workdir = saved_run(place / "run", tiny_run.make_config())
  path = mp4.write_mp4(place / "0.mp4", film(), 8, scale=SCALE)
  videos = [read_mp4(path, scale=SCALE)[0]]
  for k in range(1, ROUNDS + 1):
    options = {"video": str(path), "frames": FIRST + MORE * k, "seed": k, "prompt": PROMPT}
    path = place / f"{k}.mp4"
    told = generate.GenerateOptions(workdir=str(workdir), out=str(path), **options)
    generate.generate(told)
    videos.append(read_mp4(path, scale=SCALE)[0])
  alone = film()
  for k in range(ROUNDS + 1):
    path = mp4.write_mp4(place / f"alone_{k}.mp4", alone, 8, scale=SCALE)
    alone, _ = conditioning_files.read_video(path, 16, 16, 8)
  return videos, alone


def change(a, b) -> np.ndarray:
  return a.astype(int) - b.astype(int)


@pytest.mark.slow
def test_twenty_continuations_change_what_they_keep_as_little_as_writing_it_does(chain):
  """20 generations of a file, each kept as it is: the mean change of the first frames is at most
  that of writing and reading them as often, and no colour moves.
  """
  videos, alone = chain
  assert [len(video) for video in videos] == [FIRST + MORE * k for k in range(ROUNDS + 1)]
  after = change(videos[-1][:FIRST], film())
  written = np.abs(change(alone, film())).mean()
  assert np.abs(after).mean() <= written + 0.2, (np.abs(after).mean(), written)
  assert np.abs(after.mean((0, 1, 2))).max() <= 1, after.mean((0, 1, 2))


@pytest.mark.slow
def test_no_round_leaves_a_step_at_its_seam(chain):
  """Frames of one age beside those of another: what each round made has kept its brightness, the
  oldest as the latest, so that where two meet nothing has moved apart.
  """
  videos, _ = chain
  shifts = []
  for k in range(1, ROUNDS + 1):
    made = slice(FIRST + MORE * (k - 1), FIRST + MORE * k)
    shifts.append(change(videos[-1][made], videos[k][made]).mean())
  shifts = np.asarray([change(videos[-1][:FIRST], film()).mean(), *shifts])
  assert np.abs(shifts).max() <= 1, shifts
  assert np.abs(np.diff(shifts)).max() <= 0.7, shifts
