"""What `generate` does with a file that has the name of a video that is asked for."""

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.generation import clips
from hiar_jax.video.mp4 import write_mp4

MINE = {"prompt": "a cat", "seed": "1", "workdir": "runs/a", "recipe": "1f", "hiar_jax": "0.1.0"}


@pytest.fixture
def clip(tmp_path, monkeypatch):
  """A clip whose file would have the metadata MINE."""
  monkeypatch.setattr(clips.Clip, "provenance", lambda self, model: MINE)
  found = object.__new__(clips.Clip)
  object.__setattr__(found, "path", tmp_path / "cat.mp4")
  return found


def write(clip, metadata):
  write_mp4(clip.path, np.zeros((2, 16, 16, 3), np.uint8), 8.0, metadata)


def test_there_is_none(clip, capsys):
  assert not clip.is_done(None) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("metadata", "done", "said"),
  [
    (MINE, True, "is there already, made of the same prompt, seed and weights"),
    (MINE | {"hiar_jax": "0.0.1"}, True, "is there already"),
    (
      MINE | {"recipe": "2e", "seed": "0", "workdir": "runs/b"},
      False,
      "another video (seed 0, here 1, workdir runs/b, here runs/a): it is replaced",
    ),
    (
      MINE | {"recipe": "2e"},
      False,
      "another video (of other weights or settings): it is replaced",
    ),
  ],
)
def test_a_video_that_was_generated(clip, metadata, done, said, capsys):
  write(clip, metadata)
  assert clip.is_done(None) == done
  line = capsys.readouterr().err
  assert said in line and line.count("\n") == 1


def test_a_video_that_was_not_is_kept(clip):
  write(clip, {"title": "holidays"})
  before = clip.path.read_bytes()
  with pytest.raises(UserError, match="was not generated here; give another --out, or --overwrite"):
    clip.is_done(None)
  assert clip.path.read_bytes() == before


def test_a_torn_file_is_made_again(clip, capsys):
  write(clip, MINE)
  clip.path.write_bytes(clip.path.read_bytes()[:100])
  assert not clip.is_done(None)
  assert "is no whole video: it is made again" in capsys.readouterr().err
