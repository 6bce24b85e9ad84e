"""What lies below a directory, as leaves that can be compared bit for bit, whatever wrote it.

A thing is a file, an array store or a data set; what is in it is a dict of leaves. Left out is what
differs between two runs of one program: the times of log records and of checkpoints, the random
names of an array store's files, and with them their checksums; what commands print to stderr, and
the record of their starts.

    checkpoints, weights       every array of an OCDBT store, or of a directory of zarr arrays
    data sets (TFDS)           every feature of every record
    mp4, png                   decoded planes, pixels; and what the file says of itself
    json, jsonl, npz           every value
    TensorBoard events         every event but its time
    anything else              its bytes
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import fnmatch
import json
import pathlib
import re
import struct
from typing import Any

import numpy as np

Leaves = Mapping[str, Any]  # path -> array, bytes, text or number

STORE = "manifest.ocdbt"
ZARR3 = "zarr.json"
DATA_SET = "dataset_info.json"
ORBAX_JSON = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding")
TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs")  # of a checkpoint, by Orbax
IGNORED = ("checksums.json", "commit_success.txt", "starts.jsonl", "*.stderr", "__pycache__")


@dataclasses.dataclass(frozen=True)
class Thing:
  """name: its path below the directory. made: when it was written, in ns. read() -> its leaves."""

  name: str
  made: int
  read: Callable[[], Leaves]


@dataclasses.dataclass(frozen=True)
class Result:
  """Of one thing in two directories. size: what was compared. differences: a line each, if any."""

  name: str
  size: str
  differences: tuple[str, ...]


def compare(old: pathlib.Path, new: pathlib.Path) -> Iterator[Result]:
  """Everything below two directories, in the order in which the old one was written.

  What only the new one has comes last.
  """
  before, after = ({thing.name: thing for thing in things(root)} for root in (old, new))
  for name in [*before, *(name for name in after if name not in before)]:
    if name not in after or name not in before:
      which = "old" if name in before else "new"
      yield Result(name, "", (f"only the {which} tree leaves it",))
    else:
      a, b = before[name].read(), after[name].read()
      yield Result(name, size(a), tuple(differences(a, b)))


def size(leaves: Leaves) -> str:
  """Such as `arrays 25, numbers 6,408, values 2`: what is no array is one value."""
  arrays = [leaf for leaf in leaves.values() if isinstance(leaf, np.ndarray)]
  numbers = sum(array.size for array in arrays)
  counts = {"arrays": len(arrays), "numbers": numbers, "values": len(leaves) - len(arrays)}
  return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "empty"


# ------------------------------------------------------------------------------------ differences


def differences(a: Leaves, b: Leaves) -> Iterator[str]:
  """A line for each leaf that is not the same in both, bit for bit: -0.0 is not 0.0."""
  for name in [*a, *(name for name in b if name not in a)]:
    if name not in a or name not in b:
      leaf = a.get(name, b.get(name))
      yield f"{name}: {_show(leaf)} is only in the {'old' if name in a else 'new'} one"
    elif line := _difference(a[name], b[name]):
      yield f"{name}: {line}" if name else line


def _difference(a: Any, b: Any) -> str:
  """What tells one leaf from the other, '' for nothing."""
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    return _arrays(a, b)
  if isinstance(a, bytes) and isinstance(b, bytes):
    if a == b:
      return ""
    if len(a) == len(b):
      return _arrays(*(np.frombuffer(content, np.uint8) for content in (a, b)), "bytes")
    return f"{len(a):,} bytes -> {len(b):,}"
  same = type(a) is type(b) and (a == b or a != a and b != b)
  return "" if same else f"{_show(a)} -> {_show(b)}"


def _arrays(a: np.ndarray, b: np.ndarray, unit: str = "numbers") -> str:
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return f"{_show(a)} -> {_show(b)}"
  if a.tobytes() == b.tobytes():
    return ""
  bits = lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.itemsize)
  other = (bits(a) != bits(b)).any(-1)
  at = tuple(int(i) for i in np.argwhere(other)[0])
  line = f"{int(other.sum()):,} of {a.size:,} {unit}, first at {list(at)}: {a[at]} -> {b[at]}"
  if a.dtype.kind in "US":
    return line
  with np.errstate(invalid="ignore"):
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
  return f"{line}, at most {np.nanmax(apart):.3g} apart" if not np.isnan(apart).all() else line


def _show(leaf: Any) -> str:
  if isinstance(leaf, np.ndarray):
    return f"{leaf.dtype}{list(leaf.shape)}"
  text = repr(leaf)
  return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------- reading


def things(root: pathlib.Path) -> list[Thing]:
  """Those below a directory, in the order in which they were written."""
  return sorted(_things(root, root), key=lambda thing: (thing.made, thing.name))


def _things(folder: pathlib.Path, root: pathlib.Path) -> Iterator[Thing]:
  left, events = sorted(folder.iterdir()), 0

  def thing(path: pathlib.Path, mark: pathlib.Path, read: Callable, name: str = "") -> Thing:
    shown = path.with_name(name or path.name) if path != root else path
    return Thing(str(shown.relative_to(root)), mark.stat().st_mtime_ns, lambda: read(path))

  arrays = [path for path in left if (path / ZARR3).exists()]
  for mark, inner, read in (
    (folder / STORE, (STORE, "d", "ocdbt.process_*"), read_store),
    (folder / DATA_SET, ("*.array_record*",), read_data_set),
    *([(arrays[0] / ZARR3, [path.name for path in arrays], read_arrays)] if arrays else []),
  ):
    if mark.exists():
      yield thing(folder, mark, read)
      left = [path for path in left if not _matches(path, inner)]
  for path in left:
    if _matches(path, IGNORED):
      continue
    if path.is_dir():
      yield from _things(path, root)
    elif ".tfevents." in path.name:  # the rest of the name is a time and a host
      yield thing(path, path, read_events, f"events {events}")
      events += 1
    else:
      yield thing(path, path, read_file)


def _matches(path: pathlib.Path, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def read_file(path: pathlib.Path) -> Leaves:
  """The leaves of one file, by what its name says that it is."""
  readers = {
    ".json": read_json,
    ".jsonl": read_log,
    ".npz": read_npz,
    ".mp4": read_video,
    ".png": read_picture,
  }
  kind = ".json" if path.name in ORBAX_JSON else path.suffix
  return readers[kind](path) if kind in readers else {"": path.read_bytes()}


def read_store(folder: pathlib.Path) -> Leaves:
  """The arrays of an OCDBT store, as Orbax writes checkpoints: in zarr's layout.

  Raises ValueError for what is in another.
  """
  import tensorstore as ts  # slow to import

  base = {"driver": "ocdbt", "base": f"file://{folder}/"}
  keys = [key.decode() for key in ts.KvStore.open(base).result().list().result()]
  names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
  strangers = sorted({key.rpartition("/")[0] for key in keys} - set(names))
  if strangers:
    raise ValueError(f"{folder}: {strangers[0]} is no zarr array")
  return _read_all("zarr", {name: {**base, "path": f"{name}/"} for name in names})


def read_arrays(folder: pathlib.Path) -> Leaves:
  """The arrays of a directory with a zarr array (version 3) for each, as Orbax writes weights."""
  names = sorted(path.parent.name for path in folder.glob(f"*/{ZARR3}"))
  stores = {name: {"driver": "file", "path": f"{folder / name}/"} for name in names}
  return _read_all("zarr3", stores)


def _read_all(driver: str, stores: dict[str, dict]) -> Leaves:
  import tensorstore as ts  # slow to import

  opened = {k: ts.open({"driver": driver, "kvstore": v}, open=True) for k, v in stores.items()}
  reading = {name: store.result().read() for name, store in opened.items()}
  return {name: np.asarray(array.result()) for name, array in reading.items()}


def read_data_set(folder: pathlib.Path) -> Leaves:
  """feature -> its values in every record."""
  import tensorflow_datasets as tfds  # slow to import

  source = tfds.builder_from_directory(folder).as_data_source(split="train")
  leaves: dict[str, Any] = {"records": len(source)}
  for index in range(len(source)):
    for name, value in source[index].items():
      leaves[f"{name} {index}"] = value if isinstance(value, bytes) else np.asarray(value)
  return leaves


def read_json(path: pathlib.Path) -> Leaves:
  leaves = flatten(json.loads(path.read_text()))
  return {name: value for name, value in leaves.items() if name not in TIMES}


def read_log(path: pathlib.Path) -> Leaves:
  """Of metrics.jsonl: every record without its time."""
  records = [json.loads(line) for line in path.read_text().splitlines()]
  leaves: dict[str, Any] = {}
  for i, record in enumerate(records):
    record.pop("time", None)
    leaves |= flatten(record, f"record {i} ({record.get('stage')}, step {record.get('step')})")
  return leaves


def flatten(value: Any, name: str = "") -> dict[str, Any]:
  """{"a": {"b": [1]}} -> {"a/b/0": 1}. What is empty is a leaf."""
  if isinstance(value, dict | list) and value:
    leaves: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
      leaves |= flatten(item, f"{name}/{key}" if name else str(key))
    return leaves
  return {name: value}


def read_npz(path: pathlib.Path) -> Leaves:
  with np.load(path) as arrays:
    return dict(arrays)


def read_video(path: pathlib.Path) -> Leaves:
  """Frames [f, 3 H / 2, W] in yuv420p, their times, and what the file says of itself."""
  import av

  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    frames = list(container.decode(stream))
    said = {f"metadata/{name}": text for name, text in container.metadata.items()}
    rate, format = str(stream.average_rate), stream.codec_context.pix_fmt
  planes = np.stack([frame.to_ndarray(format=frame.format.name) for frame in frames])
  times = np.asarray([float(frame.time) for frame in frames])
  return {"frames": planes, "times": times, "rate": rate, "format": format, **said}


def read_picture(path: pathlib.Path) -> Leaves:
  from PIL import Image

  with Image.open(path) as image:
    said = {f"metadata/{name}": text for name, text in image.info.items()}
    return {"pixels": np.asarray(image), "mode": image.mode, **said}


def read_events(path: pathlib.Path) -> Leaves:
  """TensorBoard's events without their times.

  A record is its length in 8 bytes, 4 bytes of checksum, the event, 4 bytes of checksum.
  """
  from tensorboardX.proto import event_pb2

  content, at, leaves = path.read_bytes(), 0, {}
  while at < len(content):
    (length,) = struct.unpack_from("<Q", content, at)
    event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
    event.wall_time = 0
    leaves[f"event {len(leaves)} (step {event.step})"] = re.sub(r"\s+", " ", str(event)).strip()
    at += length + 16
  return leaves
