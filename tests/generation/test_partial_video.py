"""Videos of packed models while they are made: in Python, and beside the command's file."""

import numpy as np
from PIL import Image
import pytest

import hiar_jax
from hiar_jax import generate
from hiar_jax.components import patch_pca
from hiar_jax.errors import UserError
from hiar_jax.generation import clips, partial_video
from hiar_jax.model import Model
from hiar_jax.video.mp4 import read_metadata
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.untrained import (  # noqa: F401
  PROMPT,
  SEED,
  assert_same_pixels,
  compiles_quickly,
  saved_run,
  untrained,
)

BOTH_ENDS, GREY = "shapes_framepack_both_ends", 128
# of frames 0 to 7: both ends, then the gap
FILLED = ["11....11", "1111..11", "11111111"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  stages = ("teacher", "framepack")
  path = saved_run(tmp_path_factory.mktemp("both_ends"), tiny_packed.make_config(BOTH_ENDS), stages)
  codec = path / "data" / patch_pca.FILE
  with np.load(codec) as found:
    arrays = dict(found)
  # dark: latents of zeros are not grey by themselves
  np.savez(codec, **{**arrays, "mean": arrays["mean"] - np.float32(0.5)})
  return path


@pytest.fixture(scope="module")
def model(workdir):
  return hiar_jax.load(workdir)


@pytest.fixture(scope="module")
def video(model):
  return model.generate(PROMPT, frames=8, seed=SEED)


def as_text(made: np.ndarray) -> str:
  return "".join(".1"[known] for known in made.astype(int))


def check(steps: list[tuple[np.ndarray, np.ndarray]], video: np.ndarray) -> None:
  """What is made is the video's, to the bit; the rest is grey."""
  for frames, made in steps:
    assert frames.dtype == np.uint8 and frames.shape == video.shape
    np.testing.assert_array_equal(frames[made], video[made])
    assert (frames[~made] == GREY).all()
  assert steps[-1][1].all()


@pytest.mark.slow
def test_it_fills_up_to_the_video_that_generate_makes(model, video):
  steps = list(model.watch(PROMPT, frames=8, seed=SEED))
  assert [as_text(made) for _, made in steps] == FILLED
  check(steps, video)


@pytest.mark.slow
def test_given_ends_are_there_from_the_start(model, tmp_path):
  """And in Python one may stop at any step."""
  Image.fromarray(np.full((16, 16, 3), (250, 10, 10), np.uint8)).save(tmp_path / "red.png")
  told = dict(frames=7, seed=SEED, end_image=tmp_path / "red.png", takes={1: 9})
  steps = list(model.watch(PROMPT, **told))
  assert [as_text(made) for _, made in steps] == ["11....1", "1111..1", "1111111"]
  check(steps, model.generate(PROMPT, **told))
  frames, made = next(model.watch(PROMPT, **told))
  np.testing.assert_array_equal(frames, steps[0][0])


@pytest.mark.slow
def test_the_command_shows_what_is_there(workdir, video, tmp_path, monkeypatch):
  """Beside the file of each prompt; nothing of it is left but the steps' sheet."""
  shown, sheets, written = {}, [], {}

  def write_mp4(path, frames, *arguments, **options):
    shown.setdefault(path.name, []).append(frames.copy())
    assert not (tmp_path / "videos" / path.name.replace(".partial", "")).exists()
    return keep(path, frames, *arguments, **options)

  def write_last(path, pieces, *arguments, **options):
    written[path.name] = np.concatenate(list(pieces))
    assert path.with_suffix(".partial.mp4").exists()
    assert read_metadata(path.with_suffix(".partial.mp4"))["prompt"] in (PROMPT, "a green star")
    return keep(path, written[path.name], *arguments, **options)

  keep = partial_video.write_mp4
  monkeypatch.setattr(partial_video, "write_mp4", write_mp4)
  monkeypatch.setattr(clips, "write_mp4", write_last)
  draw = partial_video.contact_sheet
  seen = lambda rows, **how: sheets.append((rows, how["made"])) or draw(rows, **how)
  monkeypatch.setattr(partial_video, "contact_sheet", seen)
  (tmp_path / "list.txt").write_text(
    f"seed={SEED} out=a.mp4 | {PROMPT}\nout=b.mp4 | a green star\n"
  )
  paths = generate.generate(
    generate.GenerateOptions(
      workdir=str(workdir),
      prompts=str(tmp_path / "list.txt"),
      frames=8,
      out=str(tmp_path / "videos"),
      partial=True,
    )
  )
  names = {path.name for path in (tmp_path / "videos").iterdir()}
  assert names == {"a.mp4", "a.steps.png", "b.mp4", "b.steps.png"} and len(paths) == 2
  assert_same_pixels(written["a.mp4"], video)  # which is alone in its batch
  filled = [np.asarray([known == "1" for known in step]) for step in FILLED]
  for name in "ab":
    first, second = shown[f"{name}.partial.mp4"]
    check(
      list(zip((first, second, written[f"{name}.mp4"]), filled, strict=True)),
      written[f"{name}.mp4"],
    )
  rows, made = sheets[-1]
  assert list(made) == [
    "step 1: 4 of 8 frames",
    "step 2: 6 of 8 frames",
    "step 3: 8 of 8 frames",
  ]
  assert [as_text(known) for known in made.values()] == FILLED
  np.testing.assert_array_equal(list(rows.values()), [written["b.mp4"]] * 3)


def test_a_causal_model_is_refused_in_one_line(tmp_path):
  model = Model.of(untrained(tmp_path, tiny_run.make_config()))
  message = "partial: this model is causal.*hiar_jax.stream shows a video while it is made"
  with pytest.raises(UserError, match=message) as e:
    model.watch(PROMPT)
  assert "\n" not in str(e.value)
