"""Any window of a film is a clip: pieces that hold them all once, windows drawn anew each epoch,
ends that are held out, and recordings that stand still.
"""

import collections
import itertools

import av
import numpy as np
import pytest

from hiar_jax.data import pipeline, tfds_builder, video_folder
from hiar_jax.data.video_folder import Cut
from hiar_jax.errors import UserError
from hiar_jax.video import video_file
from hiar_jax.video.video_file import Sampling

F = 4
SAMPLING = Sampling(frames=F, height=16, width=16, fps=8, stride=F)
LENGTHS = {"a": 11, "b": 4, "c": 23}  # 8, 1 and 20 windows


def write(path, greys):
  """A film of one grey a frame, 8 a second, without loss."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=8)
    stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
    for grey in greys:
      picture = np.full((16, 16, 3), grey, np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
  path.with_suffix(".txt").write_text(path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Films whose frame n is grey 4 + 10 n."""
  path = tmp_path_factory.mktemp("films")
  for name, count in LENGTHS.items():
    write(path / f"{name}.mkv", 4 + 10 * np.arange(count))
  return path


@pytest.fixture(scope="module")
def data(tmp_path_factory, folder):
  path = tmp_path_factory.mktemp("data")
  video_folder.prepare(path, folder, Cut(SAMPLING))
  return path


def numbers(video) -> list[int]:
  """Of a clip's frames."""
  return ((video[:, 8, 8, 0].astype(int) - 4) // 10).tolist()


def batches(directory, count, size=4, seed=3, **options):
  token = lambda record: np.frombuffer(record["caption"], np.uint8)[0]
  options = {"batch_size": size, "seed": seed, "tokenize": token} | options
  return list(itertools.islice(pipeline.make_iterator(directory, **options), count))


def clips_of(batch) -> list[tuple[str, int, tuple[int, ...]]]:
  """[(film, start, numbers of the frames)]"""
  rows = zip(batch["tokens"], batch["start"], batch["video"], strict=True)
  return [(chr(film), int(start), tuple(numbers(video))) for film, start, video in rows]


def test_pieces_hold_every_window_once(data):
  records = tfds_builder.open_source(data)
  found = collections.Counter()
  for record in records:
    assert record["video"].shape == (2 * F - 1, 16, 16, 3) and 1 <= record["windows"] <= F
    for draw in range(record["windows"]):
      clip = pipeline.window(record, draw)
      assert numbers(clip["video"]) == [clip["start"] + i for i in range(F)]
      assert "windows" not in clip
      found[clip["caption"].decode(), int(clip["start"])] += 1
  expected = {(name, at) for name, count in LENGTHS.items() for at in range(count - F + 1)}
  assert set(found) == expected and set(found.values()) == {1}
  shares = [int(record["windows"]) for record in records if record["caption"] == b"c"]
  assert shares == [4] * 5
  assert pipeline.count_clips(data) == len(expected) == 29


def test_windows_are_drawn_anew_each_epoch(data):
  """All of them come, and only those; one piece gives another window when it comes again."""
  seen, firsts = collections.Counter(), set()
  made = batches(data, 80)  # an epoch is two batches
  for epoch in zip(made[::2], made[1::2], strict=True):
    rows = [(film, at) for batch in epoch for film, at, _ in clips_of(batch)]
    assert collections.Counter(film for film, _ in rows) == {"a": 2, "b": 1, "c": 5}
    seen.update(rows)
    firsts.add(min(at for film, at in rows if film == "c"))
  assert len(seen) == 29 and len(firsts) > 1
  for batch in batches(data, 8):
    assert all(frames == tuple(range(at, at + F)) for _, at, frames in clips_of(batch))


def test_a_batch_may_be_larger_than_the_films_have_pieces(data):
  """Three short films are enough for batches of 16; but not for more clips than they have."""
  (batch,) = batches(data, 1, size=16)
  assert len(set(clips_of(batch))) > 8
  with pytest.raises(UserError, match="holds 29 clips, but a batch takes 30"):
    batches(data, 1, size=30)


def test_it_goes_on_where_it_stopped(data):
  make = lambda: pipeline.make_iterator(data, batch_size=4, seed=3, tokenize=lambda record: 0)
  straight = make()
  expected = [next(straight)["start"].tolist() for _ in range(7)]
  first = make()
  for _ in range(3):
    next(first)
  again = make()
  again.set_state(first.get_state())
  assert [next(again)["start"].tolist() for _ in range(4)] == expected[3:]
  other = batches(data, 7, seed=4)
  assert [batch["start"].tolist() for batch in other] != expected


def test_processes_share_the_batches_of_one(data):
  whole = batches(data, 5)
  parts = [batches(data, 5, size=2, process_index=i, process_count=2) for i in range(2)]
  for i, batch in enumerate(whole):
    for key in ("video", "start"):
      joined = np.concatenate([part[i][key] for part in parts])
      np.testing.assert_array_equal(joined, batch[key])
  threads = batches(data, 5, num_threads=1)
  assert [clips_of(batch) for batch in threads] == [clips_of(batch) for batch in whole]


def test_starts_are_those_of_drawn_windows(data):
  records = tfds_builder.open_source(data)
  draws = [pipeline.read_starts(data, (seed,)) for seed in range(30)]
  for record, starts in zip(records, zip(*draws, strict=True), strict=True):
    first = int(record["start"])
    assert set(starts) == set(range(first, first + int(record["windows"])))


# ----------------------------------------------------------------------------------------- held out


def test_the_end_of_each_film_is_held_out(tmp_path, folder, caplog):
  video_folder.prepare(tmp_path, folder, Cut(SAMPLING, held_out=0.4))
  trained = [clip for batch in batches(tmp_path, 30) for clip in clips_of(batch)]
  last = {name: max(max(frames) for film, _, frames in trained if film == name) for name in "abc"}
  # of 11 frames 4, of 23 frames 9; four are one clip, which is trained on
  assert last == {"a": 6, "b": 3, "c": 13}
  held = tfds_builder.open_source(tmp_path / video_folder.HELD_OUT)
  assert [(clip["caption"], numbers(clip["video"])) for clip in held] == [
    (b"a", [7, 8, 9, 10]),
    (b"c", [14, 15, 16, 17]),
    (b"c", [18, 19, 20, 21]),
  ]
  assert [int(clip["start"]) for clip in held] == [7, 14, 18]
  assert "1 of 3 videos: too short to hold out a clip" in caplog.text


def test_a_small_share_is_one_clip(tmp_path, folder):
  video_folder.prepare(tmp_path, folder, Cut(SAMPLING, held_out=0.01))
  held = tfds_builder.open_source(tmp_path / video_folder.HELD_OUT)
  assert [int(clip["start"]) for clip in held] == [7, 19]


def test_another_share_is_another_data_set(tmp_path, folder):
  video_folder.prepare(tmp_path, folder, Cut(SAMPLING, held_out=0.4))
  with pytest.raises(UserError, match="made with held_out=0.4, but this run wants held_out=None"):
    video_folder.prepare(tmp_path, folder, Cut(SAMPLING))


# ------------------------------------------------------------------------------------------- still


def test_a_recording_that_stands_still_is_one_clip_of_it(tmp_path, caplog):
  """Before, between and behind what moves; and where one still picture follows another."""
  greys = [*range(0, 80, 10), *[80] * 300, *range(90, 130, 10), *[200] * 50, *[210] * 50]
  write(tmp_path / "a.mkv", greys)
  (film,) = video_folder.scan(tmp_path, Cut(SAMPLING))
  starts = [at + i for at, windows in film.records for i in range(windows)]
  shown = [tuple(greys[at : at + F]) for at in starts]
  assert len(shown) == len(set(shown)) and set(shown) == {
    tuple(greys[at : at + F]) for at in range(len(greys) - F + 1)
  }
  assert f"{296 + 46 + 46} clips stand still and show what the one before shows" in caplog.text
  whole = video_folder.scan(tmp_path, Cut(SAMPLING, pieces=False))[0].records
  assert len(whole) < 10 and (0, 1) in whole


def test_a_photograph_is_one_clip(tmp_path):
  write(tmp_path / "a.mkv", [70] * 40)
  (film,) = video_folder.scan(tmp_path, Cut(SAMPLING))
  assert film.records == [(0, 1)]


def test_an_hour_is_not_held_in_memory(tmp_path):
  """Spans are read in one pass, and nothing is kept between them."""
  write(tmp_path / "a.mkv", [*range(9), *[100] * 400, *range(120, 129)])
  spans = list(video_file.spans(tmp_path / "a.mkv", SAMPLING, [(0, 5), (3, 6), (410, 4)]))
  assert [span[:, 0, 0, 0].tolist() for span in spans] == [
    [0, 1, 2, 3, 4],
    [3, 4, 5, 6, 7, 8],
    [121, 122, 123, 124],
  ]


# --------------------------------------------------------------------------------- earlier versions


def test_a_complete_data_set_of_clips_end_to_end_is_taken(tmp_path, folder):
  """As earlier versions made: no windows in it, and no word of them in its recipe."""
  cut = Cut(SAMPLING, pieces=False)
  recipe = {name: x for name, x in video_folder.recipe(cut).items() if name != "cut"}
  films = video_folder.scan(folder, cut)
  recipe["files"] = video_folder.fingerprint(folder)
  tfds_builder.write_recipe(tmp_path, recipe)
  with pytest.raises(UserError, match="made with cut=None"):  # half made
    video_folder.prepare(tmp_path, folder, Cut(SAMPLING))
  video_folder._build(tmp_path, "video_folder/clips", films, cut)
  video_folder.prepare(tmp_path, folder, Cut(SAMPLING))
  assert pipeline.count_clips(tmp_path) == 8 == len(tfds_builder.open_source(tmp_path))
  for batch in batches(tmp_path, 6):
    assert all(at % F == 0 and frames[0] == at for _, at, frames in clips_of(batch))
