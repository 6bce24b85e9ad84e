"""docs/tour.md tells the truth: all its Python, in its order, in one namespace, beside a run."""

import re

import numpy as np
from PIL import Image
import pytest

from hiar_jax import context
from tests.helpers import tiny_run
from tests.helpers.untrained import compiles_quickly, saved_run  # noqa: F401
from tests.helpers.video_reader import read_mp4

PAGE = tiny_run.ROOT / "docs" / "tour.md"


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """What a person has after the README's second command, at a small size and untrained."""
  root = tmp_path_factory.mktemp("tour")
  # blocks of three, as the page shows them
  config = tiny_run.make_config(history__block=3, history__window=6, data__frames=9, data__size=32)
  saved_run(root / "runs" / "shapes", config)
  return root


@pytest.mark.slow
def test_the_tour(place, monkeypatch, capsys):
  monkeypatch.chdir(place)
  monkeypatch.setattr(context, "LEVELS", dict(context.LEVELS))
  names = {"__name__": "tour"}
  for number, code in enumerate(blocks("python")):
    exec(compile(code, f"{PAGE}, block {number}", "exec"), names)
  said = capsys.readouterr().out
  assert said.startswith("(72, 32, 32, 3) uint8\n")
  (table,) = blocks("text")
  assert table in said
  frames, fps, _ = read_mp4("circle.mp4", scale=8)
  assert fps == 8 and np.abs(frames.astype(int) - names["video"]).mean() < 3
  for name, rows in (("sheet.png", 1), ("levels.png", 2)):
    with Image.open(name) as sheet:
      assert sheet.width > 12 * 96 and sheet.height > rows * 96
  assert names["again"].shape == names["latents"].shape == (2, 24, 4, 4, 8)
  assert names["halfway"].method.level == "halfway:0.5"


def test_what_the_page_names_is_there():
  for link in re.findall(r"\]\(([\w./]+)\)", PAGE.read_text()):
    assert (PAGE.parent / link).exists(), link
  for name in re.findall(r"\b(?:hiar_jax|tests|experiments)/[\w/]+(?:\.py)?", PAGE.read_text()):
    assert (tiny_run.ROOT / name).exists(), name
