"""What two directories of outputs are compared by: what must be found, and what passed over."""

import json
import os
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto import event_pb2
import tensorstore as ts

from benchmarks import contents
from hiar_jax.data import tfds_builder as store
from hiar_jax.video.mp4 import write_mp4
from hiar_jax.video.png import write_png

STATE = {
  "params": {"kernel": jnp.arange(12.0).reshape(3, 4), "zero": jnp.zeros(2)},
  "ema": jnp.ones(3, jnp.bfloat16),
  "step": jnp.int32(7),
}
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
BITS = np.arange(6, dtype=np.float32).reshape(2, 3)


def changed(array, at, value):
  array = np.array(array)
  array[at] = value
  return array


# ------------------------------------------------------------------------------------------ leaves


@pytest.mark.parametrize(
  ("new", "line"),
  [
    (changed(BITS, (1, 0), np.nextafter(np.float32(3), 4)), "1 of 6 numbers, first at [1, 0]: 3.0"),
    (changed(BITS, (0, 0), -0.0), "1 of 6 numbers, first at [0, 0]: 0.0 -> -0.0"),
    (changed(BITS, (0, slice(None)), np.nan), "3 of 6 numbers, first at [0, 0]: 0.0 -> nan"),
    (BITS.astype(np.float64), "float32[2, 3] -> float64[2, 3]"),
    (BITS.reshape(3, 2), "float32[2, 3] -> float32[3, 2]"),
    (BITS.astype(ml_dtypes.bfloat16), "float32[2, 3] -> bfloat16[2, 3]"),
  ],
  ids=["a bit", "a sign of zero", "NaN", "dtype", "shape", "bfloat16"],
)
def test_what_tells_one_array_from_another(new, line):
  (found,) = contents.differences({"x": BITS}, {"x": new})
  assert found.startswith(f"x: {line}")
  assert not list(contents.differences({"x": new}, {"x": new.copy()}))


def test_values_bytes_and_names():
  a = {"n": 1, "b": b"abc", "t": "same", "gone": 0.5}
  b = {"n": 1.0, "b": b"abd", "t": "same", "new": None}
  assert list(contents.differences(a, b)) == [
    "n: 1 -> 1.0",
    "b: 1 of 3 bytes, first at [2]: 99 -> 100, at most 1 apart",
    "gone: 0.5 is only in the old one",
    "new: None is only in the new one",
  ]


def test_how_far_apart_is_said():
  a, b = np.float32([1, 2, 3]), np.float32([1, 2.5, 2])
  (line,) = contents.differences({"x": a}, {"x": b})
  assert line == "x: 2 of 3 numbers, first at [1]: 2.0 -> 2.5, at most 1 apart"
  half = lambda x: {"": np.asarray(x, ml_dtypes.bfloat16)}
  (line,) = contents.differences(half([1]), half([2]))
  assert line == "1 of 1 numbers, first at [0]: 1.0 -> 2.0, at most 1 apart"


# ------------------------------------------------------------------------------------------- files


def leave(root: pathlib.Path, run: int) -> pathlib.Path:
  """What a run leaves, of every kind; another `run` leaves the same at another time."""
  save_state(root)
  save_weight(root, BITS)
  (root / "teacher" / "6" / "checksums.json").write_text(str(run))
  times = {"init_timestamp_nsecs": run, "commit_timestamp_nsecs": run + 1, "metrics": {}}
  (root / "teacher" / "6" / "_CHECKPOINT_METADATA").write_text(json.dumps(times))
  (root / "config.json").write_text('{"seed": 0, "data": {"size": [16, 16], "folder": ""}}')
  logs = root / "logs"
  logs.mkdir()
  records, events = "", b""
  for step in (1, 2):
    record = {"stage": "teacher", "step": step, "time": run + step, "scalars": {"loss": 0.1 * step}}
    records += json.dumps(record) + "\n"
    event = event_pb2.Event(step=step, wall_time=run, file_version="x").SerializeToString()
    events += len(event).to_bytes(8, "little") + bytes(4) + event + bytes(4)
  (logs / "metrics.jsonl").write_text(records)
  (logs / f"events.out.tfevents.{1000 + run}.host").write_bytes(events)
  write_mp4(root / "a.mp4", FRAMES, 8.0, {"prompt": "a"}, scale=2)
  write_png(root / "frame.png", FRAMES[0])
  np.savez(root / "codec.npz", basis=BITS)
  (root / "table.md").write_text("| a |\n")
  (root / "train.stderr").write_text(f"{run} s\n")
  return root


def save_state(root: pathlib.Path, **changes) -> None:
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(root / "teacher" / "6" / "state", {**STATE, **changes}, force=True)


def save_weight(root: pathlib.Path, array: np.ndarray) -> None:
  place = {"driver": "file", "path": f"{root / 'weights' / 'dit' / 'head.kernel'}/"}
  spec = {"driver": "zarr3", "kvstore": place, "create": True, "delete_existing": True}
  ts.open(spec, dtype=array.dtype, shape=array.shape).result().write(array).result()


@pytest.fixture
def pair(tmp_path):
  return leave(tmp_path / "old", 0), leave(tmp_path / "new", 5)


def found(pair) -> dict[str, tuple[str, ...]]:
  """Name of a thing -> its differences."""
  return {result.name: result.differences for result in contents.compare(*pair)}


def test_two_runs_of_one_program_are_the_same(pair):
  results = list(contents.compare(*pair))
  assert {result.name: result.differences for result in results if result.differences} == {}
  sizes = {result.name: result.size for result in results}
  assert sizes["teacher/6/state"] == "arrays 4, numbers 18"
  assert sizes["weights/dit"] == "arrays 1, numbers 6"
  assert sizes["logs/metrics.jsonl"] == "values 6" and sizes["logs/events 0"] == "values 2"
  assert sizes["a.mp4"] == "arrays 2, numbers 4,611, values 7"  # 3 frames of 48 x 32, and times
  others = {"config.json", "frame.png", "codec.npz", "table.md", "teacher/6/_CHECKPOINT_METADATA"}
  assert others <= sizes.keys()
  assert not [name for name in sizes if "checksums" in name or "stderr" in name or "ocdbt" in name]


def edit(name: str, old: str, new: str):
  def change(root: pathlib.Path) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))

  return change


def save_frame(root: pathlib.Path) -> None:
  frames = changed(FRAMES, (1, slice(0, 8)), 0)
  write_mp4(root / "a.mp4", frames, 8.0, {"prompt": "a"}, scale=2)


def save_pixel(root: pathlib.Path) -> None:
  pixel = (3, 4, 1)
  write_png(root / "frame.png", changed(FRAMES[0], pixel, FRAMES[0][pixel] ^ 1))


NEXT = STATE["ema"].at[2].set(1.0078125)  # the next number of bfloat16 after 1
ZERO = changed(BITS, (0, 0), -0.0)


@pytest.mark.parametrize(
  ("change", "name", "line"),
  [
    (lambda root: save_state(root, step=jnp.int32(6)), "teacher/6/state", "step: 1 of 1 numbers"),
    (
      lambda root: save_state(root, ema=NEXT),
      "teacher/6/state",
      "ema: 1 of 3 numbers, first at [2]: 1.0 -> 1.0078125, at most 0.00781 apart",
    ),
    (
      lambda root: save_state(root, more=jnp.ones(2)),
      "teacher/6/state",
      "more: float32[2] is only in the new one",
    ),
    (lambda root: save_weight(root, ZERO), "weights/dit", "head.kernel: 1 of 6 numbers"),
    (save_frame, "a.mp4", "frames: "),
    (save_pixel, "frame.png", "pixels: 1 of 768 numbers, first at [3, 4, 1]: "),
    (lambda root: (root / "frame.png").unlink(), "frame.png", "only the old tree leaves it"),
    (lambda root: (root / "b.txt").write_text(""), "b.txt", "only the new tree leaves it"),
    (
      edit("logs/metrics.jsonl", "0.2", "0.20000001"),
      "logs/metrics.jsonl",
      "record 1 (teacher, step 2)/scalars/loss: 0.2 -> 0.20000001",
    ),
    (
      edit("config.json", '"seed": 0', '"seed": 0, "extra": 1'),
      "config.json",
      "extra: 1 is only in the new one",
    ),
    (lambda root: np.savez(root / "codec.npz", basis=ZERO), "codec.npz", "basis: 1 of 6 numbers"),
    (edit("table.md", "a", "b"), "table.md", "1 of 6 bytes, first at [2]"),
  ],
  ids="step bit array weight frame pixel missing more log config npz bytes".split(),
)
def test_a_difference_is_found_and_named(pair, change, name, line):
  change(pair[1])
  of_orbax = ("_METADATA", "_sharding", "process_0")  # its own lists of the arrays
  differing = {
    thing: lines for thing, lines in found(pair).items() if lines and not thing.endswith(of_orbax)
  }
  assert list(differing) == [name] and differing[name][0].startswith(line)


def test_what_an_event_says_counts_and_not_when(pair):
  path = next((pair[1] / "logs").glob("*tfevents*"))
  path.write_bytes(path.read_bytes().replace(b"x", b"y"))
  assert len(found(pair)["logs/events 0"]) == 2


def test_records_of_a_data_set(tmp_path):
  """As runs hold them: the records, whatever the bytes of the files are."""

  features = {"x": store.tensor((2,), np.float32)}
  for folder, last in (("old", 2.0), ("same", 2.0), ("new", 2.5)):
    examples = [{"x": np.float32(x)} for x in ([0, 0], [1, 1], [2, last])]
    store.build(tmp_path / folder, "numbers/plain", features, examples, count=3, example_bytes=8)
  assert not any(found((tmp_path / "old", tmp_path / "same")).values())
  (line,) = found((tmp_path / "old", tmp_path / "new"))["numbers/plain/1.0.0"]
  assert line == "x 2: 1 of 2 numbers, first at [1]: 2.0 -> 2.5, at most 0.5 apart"


def test_the_first_difference_is_the_one_that_was_made_first(tmp_path):
  names = ["z.txt", "a.txt", "m.txt"]
  for side in ("old", "new"):
    (tmp_path / side).mkdir()
    for second, name in enumerate(names):
      (tmp_path / side / name).write_text(side)
      os.utime(tmp_path / side / name, (second, second))
  assert list(found((tmp_path / "old", tmp_path / "new"))) == names


def test_what_cannot_be_read_as_arrays_is_no_store(tmp_path):
  save_state(tmp_path)
  folder = tmp_path / "teacher" / "6" / "state"
  place = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
  place.write("other/zarr.json", b"{}").result()
  with pytest.raises(ValueError, match="other is no zarr array"):
    contents.read_store(folder)
