"""Batches: every clip once an epoch, split over processes, resumed to the batch, whatever the
number of threads.
"""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from hiar_jax.data import pipeline, shapes_clips, tfds_builder, trajectories
from hiar_jax.data.shapes_world import VOCABULARY, WorldConfig
from hiar_jax.errors import Damaged, UserError

CLIPS = 23


def _tokenize(text):
  words = [VOCABULARY.index(word) + 1 for word in text.split()]
  return np.array(words + [0] * (20 - len(words)), np.int32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clips")
  shapes_clips.prepare(directory, WorldConfig(), clips=CLIPS, seed=0)
  return directory


@pytest.fixture(scope="module")
def numbers(clips):
  """First bytes of a clip's state -> its number in the data set."""
  made = [shapes_clips.make_clip(WorldConfig(), 0, i) for i in range(CLIPS)]
  table = {clip["position"].tobytes(): i for i, clip in enumerate(made)}
  assert len(table) == CLIPS
  return lambda batch: [table[p.tobytes()] for p in batch["position"]]


@pytest.mark.parametrize("content", [b"[1", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_recipe_is_one_line(tmp_path, content):
  (tmp_path / "recipe.json").write_bytes(content)
  for use in (tfds_builder.read_recipe, lambda path: tfds_builder.check_recipe(path, {"seed": 0})):
    with pytest.raises(
      Damaged, match=r"recipe\.json is damaged .*; restore it, or delete"
    ) as error:
      use(tmp_path)
    assert "\n" not in str(error.value)


def _iterator(directory, **changes):
  options = {
    "batch_size": 4,
    "seed": 0,
    "tokenize": lambda record: _tokenize(record["caption"].decode()),
  } | changes
  return pipeline.make_iterator(directory, **options)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_holds_clips_with_their_own_captions(clips, numbers):
  batch = next(_iterator(clips))
  shapes = {k: (v.shape, v.dtype) for k, v in batch.items()}
  assert shapes == {
    "video": ((4, 9, 32, 32, 3), np.uint8),
    "tokens": ((4, 20), np.int32),
    "background": ((4,), np.int32),
    "position": ((4, 9, 1, 2), np.float32),
    "velocity": ((4, 9, 1, 2), np.float32),
    "colour": ((4, 1), np.int32),
    "shape": ((4, 1), np.int32),
    "start": ((4,), np.int32),
  }
  for row, number in enumerate(numbers(batch)):
    clip = shapes_clips.make_clip(WorldConfig(), 0, number)
    np.testing.assert_array_equal(batch["video"][row], clip["video"])
    np.testing.assert_array_equal(batch["tokens"][row], _tokenize(clip["caption"]))


def test_every_epoch_is_another_permutation(clips, numbers):
  # 4 epochs of 23 clips
  stream = [n for batch in _take(_iterator(clips), CLIPS) for n in numbers(batch)]
  epochs = [tuple(stream[i : i + CLIPS]) for i in range(0, len(stream), CLIPS)]
  assert len(set(epochs)) == 4
  assert all(sorted(epoch) == list(range(CLIPS)) for epoch in epochs)


def test_seeds_differ_and_repeat(clips, numbers):
  first = [numbers(next(_iterator(clips, seed=seed))) for seed in (0, 1, 2**40, 0)]
  assert first[0] == first[3] and first[0] != first[1] != first[2]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch(clips, processes):
  """Together, in order, they hold what one process would: so an epoch is covered once, and no clip
  is read twice.
  """
  parts = [
    _iterator(clips, batch_size=2, process_index=p, process_count=processes)
    for p in range(processes)
  ]
  whole = _iterator(clips, batch_size=2 * processes)
  for _ in range(8):
    shares = [next(part) for part in parts]
    _assert_same({k: np.concatenate([s[k] for s in shares]) for k in shares[0]}, next(whole))


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resumes_exactly_on_any_number_of_threads(clips, stop):
  iterator = _iterator(clips, num_threads=2)
  _take(iterator, stop)
  state = json.loads(json.dumps(iterator.get_state()))  # a checkpoint keeps no more than this
  expected = _take(iterator, 9)
  for threads in (0, 1, 5):
    other = _iterator(clips, num_threads=threads)
    _take(other, 2)
    other.set_state(state)
    for a, b in zip(_take(other, 9), expected, strict=True):
      _assert_same(a, b)


def test_keys_choose_the_arrays(clips):
  assert set(next(_iterator(clips, keys=("video",)))) == {"video", "tokens"}
  with pytest.raises(UserError, match="has no trajectory; it has .*video"):
    _iterator(clips, keys=("trajectory",))


def test_trajectories_arrive_as_float32(tmp_path):
  writer = trajectories.TrajectoryWriter(tmp_path, (1.0, 0.5), 6, 6, dtype="float16")
  latents = np.random.default_rng(0).normal(size=(6, 2, 3, 2, 2, 4))
  writer.write_part(0, latents, ["a red circle moving left"] * 6)
  writer.finish()
  batch = next(_iterator(tmp_path))
  assert batch["trajectory"].shape == (4, 2, 3, 2, 2, 4) and batch["trajectory"].dtype == np.float32
  np.testing.assert_array_equal(
    batch["tokens"], np.stack([_tokenize("a red circle moving left")] * 4)
  )


def test_captions_in_order(clips):
  expected = [shapes_clips.make_clip(WorldConfig(), 0, i)["caption"] for i in range(CLIPS)]
  assert pipeline.read_captions(clips) == expected


def test_starts_in_order(tmp_path):
  world = WorldConfig(later=0.5)
  shapes_clips.prepare(tmp_path, world, CLIPS, 0)
  expected = [int(shapes_clips.make_clip(world, 0, i)["start"]) for i in range(CLIPS)]
  assert len(set(expected)) > 1 and pipeline.read_starts(tmp_path) == expected


def test_only_what_is_wanted_is_decoded(clips, monkeypatch):
  """A list of captions or starts costs no frames: features are decoded by name."""
  decoded = []
  decode = tfds.features.Tensor.decode_example_np
  monkeypatch.setattr(
    tfds.features.Tensor,
    "decode_example_np",
    lambda self, example: decoded.append(self.shape) or decode(self, example),
  )
  assert pipeline.read_starts(clips) == [0] * CLIPS and set(decoded) == {()}
  decoded.clear()
  assert len(pipeline.read_captions(clips)) == CLIPS and set(decoded) <= {()}


def test_too_few_clips_or_none(clips, tmp_path):
  with pytest.raises(UserError, match="holds 23 clips, but a batch takes 24"):
    _iterator(clips, batch_size=12, process_count=2)
  with pytest.raises(UserError, match="a batch takes 0"):
    _iterator(clips, batch_size=0)
  with pytest.raises(UserError, match="no complete data set"):
    _iterator(tmp_path)
