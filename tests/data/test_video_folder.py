"""A folder of real H.264 files: what can be used is used at the right time and size, the rest is
named.
"""

import dataclasses
import json

import av
import numpy as np
import pytest

from hiar_jax.data import tfds_builder, video_folder
from hiar_jax.data.video_folder import Cut
from hiar_jax.errors import UserError
from hiar_jax.video import video_file
from hiar_jax.video.video_file import Sampling
from tests.helpers.video_reader import clips

SAMPLING = Sampling(frames=5, height=32, width=48, fps=8, stride=5)
CLIPS = Cut(SAMPLING, pieces=False)


def _write(
  path, seconds=2.0, fps=24, size=(64, 48), codec="libx264", pictures=None, options=None, rotation=0
):
  """A film whose red rises from 0 to 250 with time; green marks the left half, blue the top
  half.
  """
  width, height = size
  count = round(seconds * fps)
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(
      codec, rate=fps, options={"g": "12", "crf": "10"} if codec == "libx264" else {}
    )
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    if rotation:
      stream.set_display_rotation(rotation)
    for i in range(count):
      image = np.zeros((height, width, 3), np.uint8)
      image[..., 0] = 250 * (i / fps) / seconds
      image[:, : width // 2, 1] = 200
      image[: height // 2, :, 2] = 200
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())
  return path


def _prepare(directory, folder, held_out=0.0, **changes):
  sampling = dataclasses.replace(SAMPLING, **changes)
  video_folder.prepare(directory, folder, Cut(sampling, held_out=held_out))


def _reds(clips):
  """Of the lower right corner, where there is nothing but red."""
  return np.concatenate([c[:, 28, 44, 0].astype(float) for c in clips])


@pytest.mark.parametrize(
  "fps, size", [(24, (64, 48)), (30, (90, 160)), (5, (200, 40)), (8, (48, 32)), (60, (32, 32))]
)
def test_frames_are_those_on_screen(tmp_path, fps, size):
  """Two seconds at any frame rate and size are 16 frames at 8 a second, each the picture shown at
  its time.
  """
  path = _write(tmp_path / "a.mp4", 2.0, fps, size)
  sampling = Sampling(4, 32, 48, 8, 4)
  assert len(video_file.survey(path, sampling)[0]) == 16
  found = list(clips(path, sampling))
  assert len(found) == 4 and all(c.shape == (4, 32, 48, 3) and c.dtype == np.uint8 for c in found)
  times = np.floor(np.arange(16) / 8 * fps + 1e-6) / fps
  np.testing.assert_allclose(_reds(found), 250 * times / 2, atol=6)
  # The crop is centred: the halves still meet in the middle.
  frame = found[-1][-1].astype(int)
  assert (frame[:, :20, 1] > 150).all() and (frame[:, 28:, 1] < 60).all()
  assert (frame[:12, :, 2] > 150).all() and (frame[20:, :, 2] < 60).all()


def test_uneven_timestamps(tmp_path):
  """A film that holds its third picture for a second: the clock counts, not the pictures."""
  path = tmp_path / "a.mkv"
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i, tick in enumerate([0, 1, 2, 12, 13, 14]):
      frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * i, np.uint8), format="rgb24")
      frame.pts = tick
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  found = list(clips(path, Sampling(15, 48, 64, 10, 15)))
  np.testing.assert_allclose(found[0][:, 5, 5, 0], [0, 40] + [80] * 10 + [120, 160, 200], atol=4)


@pytest.mark.parametrize("rotation, turns", [(90, 1), (-90, -1), (180, 2)])
def test_a_phone_held_upright(tmp_path, rotation, turns):
  """The container says how far to turn the picture, counterclockwise, in degrees."""
  path = _write(tmp_path / "a.mp4", 1.0, 8, (64, 48), rotation=rotation)
  height, width = (64, 48) if rotation % 180 else (48, 64)
  clip = next(clips(path, Sampling(5, height, width, 8, 5)))
  flat = next(clips(_write(tmp_path / "b.mp4", 1.0, 8, (64, 48)), Sampling(5, 48, 64, 8, 5)))
  np.testing.assert_allclose(clip.astype(int), np.rot90(flat, turns, axes=(1, 2)), atol=3)


def test_stride_overlaps_clips(tmp_path):
  path = _write(tmp_path / "a.mp4", 2.0, 24)
  found = list(clips(path, Sampling(5, 32, 48, 8, 2)))
  moves, _ = video_file.survey(path, Sampling(5, 32, 48, 8, 2))
  assert len(found) == 6 and video_file.starts(moves, 5, 2)[0].tolist() == [0, 2, 4, 6, 8, 10]
  np.testing.assert_array_equal(found[0][2:], found[1][:3])
  skipping = Sampling(2, 32, 48, 8, 7)
  assert len(list(clips(path, skipping))) == len(video_file.starts(moves, 2, 7)[0]) == 3


def _shorten(path, size):
  path.write_bytes(path.read_bytes()[:size])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  """Three good films of different make, and one of every kind that cannot be used."""
  folder = tmp_path_factory.mktemp("mixed")
  _write(folder / "good.mp4", 2.0, 24)
  _write(folder / "tall.mov", 1.5, 30, (90, 160))
  (folder / "deeper").mkdir()
  _write(folder / "deeper" / "old.mkv", 1.0, 12, (128, 72), codec="mpeg4")
  for name in ("cut", "ends"):
    _write(folder / f"{name}.mp4", 2.0, 30, (96, 64), options={"movflags": "faststart"})
  with av.open(str(folder / "ends.mp4")) as container:
    ends = [p.pos + p.size for p in container.demux(video=0) if p.size]
  _shorten(folder / "cut.mp4", ends[30] - 20)  # in the middle of a picture
  _shorten(folder / "ends.mp4", ends[30])  # between two
  damaged = bytearray((folder / "good.mp4").read_bytes())
  start = damaged.find(b"mdat") + 1500
  damaged[start : start + 1000] = np.random.default_rng(0).bytes(1000)
  (folder / "damaged.mp4").write_bytes(damaged)
  (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
  (folder / "empty.mp4").touch()
  _write(folder / "short.mp4", 0.5, 24)
  _write(folder / "silent.mp4", 1.0, 24)
  _write(folder / "blank.mp4", 1.0, 24)
  for name in ("good", "tall", "deeper/old", "cut", "ends", "damaged", "noise", "empty", "short"):
    (folder / f"{name}.txt").write_text(f" the film\n{name} \n")
  (folder / "blank.txt").write_text(" \n")
  (folder / "notes.md").write_text("not a video")
  return folder


def test_good_files_are_kept_and_bad_ones_named(tmp_path, mixed, caplog, capsys):
  _prepare(tmp_path, mixed)
  lines = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
  reasons = {line.split()[1].rstrip(":"): line for line in lines}
  expected = {
    "cut.mp4": "",
    "damaged.mp4": "",
    "ends.mp4": "cut off: 31 of 60",
    "noise.mp4": "Invalid data",
    "empty.mp4": "Invalid data",
    "short.mp4": "too short: 4 frames at 8",
    "silent.mp4": "no caption: there is no silent.txt beside it",
    "blank.mp4": "no caption in blank.txt",
  }
  assert set(reasons) == set(expected)
  for name, reason in expected.items():
    assert reason in reasons[name] and "\n" not in reasons[name]
  assert "3 of 11 videos used, 8 skipped, 24 clips\n" in capsys.readouterr().err
  source = tfds_builder.open_source(tmp_path)
  captions = [r["caption"].decode() for r in source]
  assert captions == ["the film deeper/old"] + ["the film good"] * 3 + ["the film tall"] * 2
  assert [(int(r["start"]), int(r["windows"])) for r in source] == [
    *((0, 4), (0, 4), (4, 4), (8, 4), (0, 4), (4, 4))
  ]
  assert all(r["video"].shape == (9, 32, 48, 3) for r in source)
  reds = _reds([source[i]["video"][:4] for i in (1, 2, 3)])
  np.testing.assert_allclose(reds, 250 * np.arange(12) / 16, atol=6)


def test_what_is_changed_is_said_once_a_folder(tmp_path, caplog):
  """How many films are turned, not a line for each."""
  for name in "ab":
    _write(tmp_path / f"{name}.mp4", 1.0, 8, rotation=90)
    (tmp_path / f"{name}.txt").write_text("a film")
  video_folder.scan(tmp_path, CLIPS)
  said = [r.getMessage() for r in caplog.records if "container" in r.getMessage()]
  assert said == [f"{tmp_path}: 2 of 2 videos: turned upright by its container's note"]


def test_preparing_again_needs_no_folder_and_says_what_changed(tmp_path, caplog):
  folder, directory = tmp_path / "films", tmp_path / "data"
  folder.mkdir()
  _write(folder / "a.mp4")
  (folder / "a.txt").write_text("a film")
  _prepare(directory, folder)
  stamps = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
  _prepare(directory, folder)
  assert not caplog.records
  (folder / "b.mp4").touch()
  _prepare(directory, folder)
  assert "has changed since" in caplog.text
  (folder / "b.mp4").unlink()
  (folder / "a.mp4").unlink()
  (folder / "a.txt").unlink()
  folder.rmdir()
  _prepare(directory, folder)
  assert stamps == {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
  with pytest.raises(UserError, match="fps=8.*fps=16"):
    _prepare(directory, folder, fps=16)


def test_a_project_that_is_moved_goes_on(tmp_path, monkeypatch, caplog):
  """Also one of an earlier version, which wrote where the folder lay."""
  (tmp_path / "one" / "clips").mkdir(parents=True)
  _write(tmp_path / "one" / "clips" / "a.mp4").with_suffix(".txt").write_text("a")
  monkeypatch.chdir(tmp_path / "one")
  _prepare("data", "clips")
  recipe = tmp_path / "one" / "data" / "recipe.json"
  assert str(tmp_path) not in recipe.read_text()
  recipe.write_text(
    json.dumps(json.loads(recipe.read_text()) | {"folder": f"{tmp_path}/one/clips"})
  )
  (tmp_path / "one").rename(tmp_path / "two")
  monkeypatch.chdir(tmp_path / "two")
  _prepare("data", "clips")
  assert len(tfds_builder.open_source("data")) == 3 and "has changed" not in caplog.text


def test_linked_folders_are_used(tmp_path):
  """On another disk, say; each file once, however many links lead to it, and no loop is entered."""
  folder, disk = tmp_path / "clips", tmp_path / "disk"
  (folder / "own").mkdir(parents=True)
  (disk / "deep").mkdir(parents=True)
  for path in (folder / "here", folder / "own" / "mine", disk / "there", disk / "deep" / "deeper"):
    _write(path.with_suffix(".mp4")).with_suffix(".txt").write_text(path.name)
  for link, target in {
    folder / "more": disk,
    folder / "once_more": disk,
    folder / "again": folder / "own",
    folder / "own" / "loop": folder,
    disk / "deep" / "up": disk,
    folder / "all": tmp_path,
  }.items():
    link.symlink_to(target)
  used = {
    str(film.path.relative_to(folder)): film.caption for film in video_folder.scan(folder, CLIPS)
  }
  names = {"here": "here", "mine": "own/mine", "there": "more/there", "deeper": "more/deep/deeper"}
  assert used == {f"{path}.mp4": name for name, path in names.items()}
  before = video_folder.fingerprint(folder)
  (disk / "deep" / "deeper.txt").write_text("another caption")
  assert video_folder.fingerprint(folder) != before


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_names_files_and_captions(tmp_path, kind):
  folder = tmp_path / "films"
  folder.mkdir()
  for name in ("a", "b", "unlisted"):
    _write(folder / f"{name}.mp4", 1.0, 12)
  rows = [("./b.mp4", 'one, "two"'), ("a.mp4", "first"), ("gone.mp4", "lost")]
  if kind == "jsonl":
    text = "".join(json.dumps({"file": f, "caption": c}) + "\n" for f, c in rows) + "\n"
  else:
    text = "\ufefffile,caption\n" + "".join(
      '{},"{}"\n'.format(f, c.replace('"', '""')) for f, c in rows
    )
  (folder / f"metadata.{kind}").write_text(text, encoding="utf-8")
  _prepare(tmp_path / "data", folder)
  assert [r["caption"].decode() for r in tfds_builder.open_source(tmp_path / "data")] == [
    "first",
    'one, "two"',
  ]


def test_a_caption_that_is_no_text_is_named_and_its_film_left_out(tmp_path, caplog):
  """Half an emoji, as JSON may write it, is found before a data set is written."""
  folder = tmp_path / "films"
  folder.mkdir()
  for name in "ab":
    _write(folder / f"{name}.mp4", 1.0, 8)
  rows = ('{"file": "a.mp4", "caption": "a circle \\ud83d"}', '{"file": "b.mp4", "caption": "b"}')
  (folder / "metadata.jsonl").write_text("\n".join(rows))
  _prepare(tmp_path / "data", folder)
  assert [r["caption"].decode() for r in tfds_builder.open_source(tmp_path / "data")] == ["b"]
  assert "skipped a.mp4: its caption in the metadata holds half a character" in caplog.text


def test_every_caption_of_a_film_is_used(tmp_path, caplog):
  """A film with two captions is there twice, and a stopped run goes on in the middle of it."""
  _write(tmp_path / "a.mp4", 2.0, 8)
  _write(tmp_path / "b.mp4", 1.0, 8)
  (tmp_path / "metadata.csv").write_text(
    "file,caption\na.mp4,a red circle\nb.mp4,b\na.mp4,something round\na.mp4,a red circle\n"
  )
  films = video_folder.scan(tmp_path, CLIPS)
  assert [(film.path.name, film.caption, len(film.records)) for film in films] == [
    ("a.mp4", "a red circle", 3),
    ("a.mp4", "something round", 3),
    ("b.mp4", "b", 1),
  ]
  assert "1 of 2 videos: several captions" in caplog.text
  records = list(video_folder.records(films, CLIPS, 2))
  assert [(r["caption"], int(r["start"])) for r in records] == [
    ("a red circle", 10),
    *(("something round", start) for start in (0, 5, 10)),
    ("b", 0),
  ]


def test_names_as_cameras_and_notebooks_leave_them(tmp_path, caplog):
  """Endings in capitals and of other containers are used; what is not is said in one line."""
  _write(tmp_path / "plain.mp4", 1.0, 8)
  endings = ["MP4", "mpg", "ts", "gif", "3gp", "wmv"]
  for ending in endings:
    (tmp_path / f"{ending}.{ending}").write_bytes((tmp_path / "plain.mp4").read_bytes())
    (tmp_path / f"{ending}.TXT").write_text(ending)
  for folder in (".Trash", ".ipynb_checkpoints"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "plain.mp4").write_bytes((tmp_path / "plain.mp4").read_bytes())
    (tmp_path / folder / "plain.txt").write_text("hidden")
  (tmp_path / "._plain.mp4").write_bytes(b"Mac")
  (tmp_path / "plain.txt").write_text("plain")
  for name in ("notes.md", "more.md", "disc.vob"):
    (tmp_path / name).write_text("")
  before = video_folder.fingerprint(tmp_path)
  films = video_folder.scan(tmp_path, CLIPS)
  assert {film.path.name: film.caption for film in films} == {
    "plain.mp4": "plain",
    **{f"{ending}.{ending}": ending for ending in endings},
  }
  (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
  assert said == f"{tmp_path}: left out: 2 .md, 1 .vob, 5 beginning with a dot"
  (tmp_path / ".Trash" / "plain.mp4").unlink()  # and changes nothing
  assert video_folder.fingerprint(tmp_path) == before


def test_nothing_usable_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="is not a folder"):
    _prepare(tmp_path / "data", tmp_path / "nowhere")
  (tmp_path / "films").mkdir()
  with pytest.raises(UserError, match="no video files there"):
    _prepare(tmp_path / "data", tmp_path / "films")
  (tmp_path / "films" / "a.mp4").write_bytes(b"not a film")
  (tmp_path / "films" / "a.txt").write_text("a film")
  with pytest.raises(UserError, match=r"all 1 were skipped, the first as a\.mp4: Invalid data"):
    _prepare(tmp_path / "data", tmp_path / "films")
  with pytest.raises(UserError, match="fps=0"):
    _prepare(tmp_path / "data", tmp_path / "films", fps=0)
  assert not (tmp_path / "data").exists()
