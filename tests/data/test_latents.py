"""Clips stored as latents: each encoded once, with its caption and start, whatever stops the work;
another codec, folder or dtype is refused.
"""

import numpy as np
import pytest

from hiar_jax.data import latents, pipeline, tfds_builder
from hiar_jax.data.sources import DataConfig, Source
from hiar_jax.errors import UserError
from hiar_jax.video.mp4 import write_mp4

SHAPE = (2, 2, 4, 3)  # of a clip's latents
FRAMES = {"a": 9, "b": 16, "c": 5}  # of each video; a clip takes 5
CAPTIONS = ["the film a", "the film b", "the film b", "the film b", "the film c"]
STARTS = [0, 0, 5, 10, 0]


class Codec:
  """Means of patches of 8 x 8 pixels, of a clip's first and last frame; counts what it is given.

  stop: the call that is never finished.
  """

  def __init__(self, stop: int = 0, gain: float = 1 / 255):
    self.calls, self.stop, self.gain = 0, stop, gain

  def __call__(self, video):
    assert video.dtype == np.uint8 and video.shape == (1, 5, 16, 32, 3)
    self.calls += 1
    if self.calls == self.stop:
      raise KeyboardInterrupt
    ends = video[:, [0, -1]].astype(np.float32).reshape(1, 2, 2, 8, 4, 8, 3)
    return ends.mean((3, 5)) * self.gain


@pytest.fixture
def folder(tmp_path):
  """Three films of one brightness after another, each with its caption."""
  films = tmp_path / "films"
  films.mkdir()
  for number, (name, frames) in enumerate(FRAMES.items()):
    bright = 8 * np.arange(frames, dtype=np.uint8) + 60 * number
    video = np.broadcast_to(bright[:, None, None, None], (frames, 16, 32, 3))
    write_mp4(films / f"{name}.mp4", np.ascontiguousarray(video), 8)
    (films / f"{name}.txt").write_text(f"the film {name}")
  return films


def config(folder, **changes) -> DataConfig:
  return DataConfig(**{"source": "videos", "folder": str(folder), "frames": 5, **changes})


def prepare(directory, folder, encode, *, dtype="float32", codec="first", source=None):
  source = source or config(folder, size=(16, 32)).opened
  latents.prepare(directory, source, encode, SHAPE, dtype=dtype, codec={"codec": codec})


def read(directory) -> list[dict]:
  source = tfds_builder.open_source(directory)
  return [source[i] for i in range(len(source))]


def brightness(record) -> list[float]:
  """Of the first and the last frame, 0 to 255."""
  return 255 * record["latents"].astype(np.float32).mean((1, 2, 3))


def test_every_clip_is_there_once(tmp_path, folder):
  encode = Codec()
  prepare(tmp_path / "data", folder, encode)
  records = read(tmp_path / "data")
  assert encode.calls == len(records) == 5
  assert [record["caption"].decode() for record in records] == CAPTIONS
  assert [int(record["start"]) for record in records] == STARTS
  assert all(record["latents"].shape == SHAPE for record in records)
  films = [0, 1, 1, 1, 2]
  for record, film, start in zip(records, films, STARTS, strict=True):
    expected = [8 * start + 60 * film, 8 * (start + 4) + 60 * film]
    np.testing.assert_allclose(brightness(record), expected, atol=3)
  prepare(tmp_path / "data", folder, encode)
  for path in folder.iterdir():
    path.unlink()
  folder.rmdir()
  prepare(tmp_path / "data", folder, encode)  # the folder is no longer needed
  assert encode.calls == 5


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on(tmp_path, folder, monkeypatch, stop):
  """With the first clip that is not stored, to the same records."""
  monkeypatch.setattr(latents, "PART_BYTES", 1)  # a clip a part
  prepare(tmp_path / "straight", folder, Codec())
  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "data", folder, Codec(stop))
  assert not tfds_builder.is_complete(tmp_path / "data")
  rest = Codec()
  prepare(tmp_path / "data", folder, rest)
  assert rest.calls == 5 - (stop - 1)
  for one, other in zip(read(tmp_path / "straight"), read(tmp_path / "data"), strict=True):
    np.testing.assert_array_equal(one["latents"], other["latents"])
    assert (one["caption"], one["start"]) == (other["caption"], other["start"])


def test_a_part_in_the_middle_is_made_again(tmp_path, folder, monkeypatch):
  monkeypatch.setattr(latents, "PART_BYTES", 1)
  prepare(tmp_path / "straight", folder, Codec())
  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "data", folder, Codec(stop=5))
  (tmp_path / "data" / "parts" / "part-00002-of-00005.npz").unlink()
  rest = Codec()
  prepare(tmp_path / "data", folder, rest)
  assert rest.calls == 2
  for one, other in zip(read(tmp_path / "straight"), read(tmp_path / "data"), strict=True):
    np.testing.assert_array_equal(one["latents"], other["latents"])


def test_bfloat16_arrives_as_float32(tmp_path, folder):
  prepare(tmp_path / "float32", folder, Codec())
  prepare(tmp_path / "bfloat16", folder, Codec(), dtype="bfloat16")
  wide, short = (read(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
  assert {record["latents"].dtype.name for record in short} == {"bfloat16"}
  for one, other in zip(wide, short, strict=True):
    near = other["latents"].astype(np.float32)
    np.testing.assert_allclose(near, one["latents"], rtol=2**-8)
    assert (near != one["latents"]).any()
  batches = pipeline.make_iterator(
    tmp_path / "bfloat16", batch_size=5, seed=0, tokenize=lambda r: np.zeros(1), keys=("latents",)
  )
  assert next(batches)["latents"].dtype == np.float32
  with pytest.raises(UserError, match="latent_dtype = 'float16': expected one of float32, bfloat1"):
    config(folder, latent_dtype="float16")


@pytest.mark.parametrize("complete", [True, False])
def test_what_was_made_otherwise_is_refused(tmp_path, folder, complete, monkeypatch):
  monkeypatch.setattr(latents, "PART_BYTES", 1)
  if complete:
    prepare(tmp_path / "data", folder, Codec())
  else:
    with pytest.raises(KeyboardInterrupt):
      prepare(tmp_path / "data", folder, Codec(stop=3))
  wider = config(folder, size=(16, 40)).opened
  for changes, message in (
    ({"codec": "another"}, "made with codec='first', but this run wants codec='another'"),
    ({"dtype": "bfloat16"}, "made with dtype='float32', but this run wants dtype='bfloat16'"),
    ({"source": wider}, "made with width=32, but this run wants width=40"),
  ):
    with pytest.raises(UserError, match=message) as error:
      prepare(tmp_path / "data", folder, Codec(), **changes)
    assert "\n" not in str(error.value)


def test_a_folder_that_changes_on_the_way_is_refused(tmp_path, folder, monkeypatch, caplog):
  monkeypatch.setattr(latents, "PART_BYTES", 1)
  with pytest.raises(KeyboardInterrupt):
    prepare(tmp_path / "stopped", folder, Codec(stop=3))
  prepare(tmp_path / "complete", folder, Codec())
  (folder / "a.txt").write_text("another caption")
  with pytest.raises(UserError, match="made with files="):
    prepare(tmp_path / "stopped", folder, Codec())
  prepare(tmp_path / "complete", folder, Codec())
  assert "has changed since" in caplog.text


def test_latents_that_are_not_finite_are_refused(tmp_path, folder):
  with pytest.raises(UserError, match=r"latents range\(0, 5\) are not finite as float32; check"):
    prepare(tmp_path / "data", folder, Codec(gain=np.nan))


def test_no_clips_is_one_line(tmp_path, folder):
  source = config(folder, frames=17, size=(16, 32)).opened
  with pytest.raises(UserError, match="all 3 were skipped, the first as a.mp4: too short") as error:
    prepare(tmp_path / "data", folder, Codec(), source=source)
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="nowhere is not a folder"):
    prepare(tmp_path / "data", tmp_path / "nowhere", Codec())


class Ramps(Source):
  """Of another fork: clips alone."""

  def clips(self):
    for i in range(self.data.clips):
      yield np.full((5, 16, 16, 3), 50 * i, np.uint8), f"ramp {i}"


class First(Codec):
  """The first pixel of each clip."""

  def __call__(self, video):
    self.calls += 1
    if self.calls == self.stop:
      raise KeyboardInterrupt
    return video[:, :1, :1, :1].astype(np.float32)


def test_any_source_has_latents(tmp_path, monkeypatch):
  """Of the shapes world and of a fork; from any clip on."""
  monkeypatch.setattr(latents, "PART_BYTES", 1)
  shapes = DataConfig(source="shapes", clips=3, frames=5, size=32, later=0.9).opened
  ramps = Ramps(DataConfig(clips=3, frames=5, size=16))
  for name, source in (("shapes", shapes), ("ramps", ramps)):
    with pytest.raises(KeyboardInterrupt):
      prepare(tmp_path / name, None, First(stop=3), source=source)
    rest = First()
    prepare(tmp_path / name, None, rest, source=source)
    assert rest.calls == 1
    for record, clip in zip(read(tmp_path / name), source.find().read(0), strict=True):
      np.testing.assert_array_equal(record["latents"][0, 0, 0], clip["video"][0, 0, 0])
      assert record["caption"].decode() == clip["caption"] and record["start"] == clip["start"]
