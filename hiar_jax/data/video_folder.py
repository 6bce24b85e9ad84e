"""A folder of real videos as a TFDS data set: any container, codec, size and frame rate that FFmpeg
reads.

Captions come from `metadata.jsonl` or `metadata.csv` in the folder (columns file, caption) if there
is one, else from `name.txt` beside `name.mp4`. Files that cannot be used are skipped, each with a
warning.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any

from absl import logging
import av
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from hiar_jax.data import tfds_builder
from hiar_jax.errors import UserError
from hiar_jax.video import video_file
from hiar_jax.video.video_file import Sampling

_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


def prepare(
  directory: str | os.PathLike,
  source_folder: str | os.PathLike,
  frames: int,
  height: int,
  width: int,
  fps: float,
  stride: int | None = None,
) -> None:
  """Cuts every usable video of a folder into clips of `frames` frames at `fps`.

  Records are {video uint8 [f, H, W, 3], start int32 [], caption}: the clips of a file in order,
  files by name.

  stride: frames from the start of a clip to that of the next; default: end to end. Does nothing if
  the data set is complete; warns if the folder has changed since.

  Raises:
    UserError: no such folder, no usable video in it, bad metadata, bad sizes, or a directory of
      other settings.
  """
  sampling = Sampling(frames, height, width, fps, stride or frames)
  made_from = recipe(source_folder, sampling)
  if is_made(directory, source_folder, made_from):
    return
  folder = pathlib.Path(source_folder)
  videos = scan(folder, sampling)
  tfds_builder.write_recipe(directory, {**made_from, "files": fingerprint(folder)})
  features = {
    "video": tfds_builder.tensor((frames, height, width, 3), np.uint8),
    "start": tfds_builder.tensor((), np.int32),
    "caption": tfds.features.Text(),
  }
  tfds_builder.build(
    directory,
    "video_folder/clips",
    features,
    records(videos, sampling),
    count=sum(clips for _, _, clips in videos),
    example_bytes=frames * height * width * 3,
  )


def recipe(source_folder: str | os.PathLike, sampling: Sampling) -> dict[str, Any]:
  """Returns what the clips of a folder are made from, as JSON values; its files aside."""
  return {
    "kind": "video folder",
    "folder": os.path.abspath(source_folder),
    **dataclasses.asdict(sampling),
  }


def is_made(
  directory: str | os.PathLike, source_folder: str | os.PathLike, made_from: Mapping[str, Any]
) -> bool:
  """Returns True where a data set made by this recipe is complete; warns if the folder has changed
  since.

  Raises:
    UserError: a directory of another recipe, or no such folder where it is needed.
  """
  tfds_builder.check_recipe(directory, made_from, ignore=tfds_builder.OF_PARTS)
  folder = pathlib.Path(source_folder)
  if not tfds_builder.is_complete(directory):
    if not folder.is_dir():
      raise UserError(
        f"{source_folder} is not a folder; give the folder that holds the videos and their captions"
      )
    return False
  # The folder itself is no longer needed, and may be gone.
  used = tfds_builder.read_recipe(directory)["files"]
  if folder.is_dir() and used != fingerprint(folder):
    logging.warning(
      "%s has changed since %s was made from it; delete the latter to use the new files",
      source_folder,
      directory,
    )
  return True


def records(
  videos: Sequence[tuple[pathlib.Path, str, int]], sampling: Sampling, first: int = 0
) -> Iterator[dict[str, Any]]:
  """Yields {video, start, caption} of the clips from number `first` on; videos: those of `scan`."""
  for path, caption, count in videos:
    if first < count:
      # a file is only read forwards: clips before the first one are decoded too
      clips = enumerate(video_file.clips(path, sampling))
      for number, clip in itertools.islice(clips, first, None):
        yield {"video": clip, "start": np.int32(number * sampling.stride), "caption": caption}
    first = max(0, first - count)


def scan(folder: pathlib.Path, sampling: Sampling) -> list[tuple[pathlib.Path, str, int]]:
  """Decodes every file once and returns (path, caption, number of clips) of the usable ones; logs a
  warning for each of the others.

  Raises:
    UserError: none can be used; gives the reason for the first.
  """
  captions = read_captions(folder)
  videos = (p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
  # Files that only the metadata names are listed too, so that they are reported as missing.
  names = sorted({*captions, *(str(path.relative_to(folder)) for path in videos)})
  sources, skipped, changed = [], [], collections.Counter()
  for name in tqdm.tqdm(names, "checking videos", unit="file"):
    try:
      caption = _caption(folder, name, captions)
      # Headers are often wrong about lengths: the frames are counted by decoding.
      count, changes = video_file.survey(folder / name, sampling)
      changed.update(changes)
      sources.append((folder / name, caption, count))
    except (video_file.Unusable, av.error.FFmpegError) as error:
      reason = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
      skipped.append(f"{name}: {reason}")
      logging.warning("skipped %s", skipped[-1])
  if not sources:
    reason = "no video files there"
    if skipped:
      reason = f"all {len(skipped)} were skipped, the first as {skipped[0]}"
    raise UserError(
      f"no usable video in {folder} ({reason}); it needs clip.mp4 beside clip.txt, or a "
      "metadata.jsonl"
    )
  for change, times in changed.items():
    logging.warning("%s: %d of %d videos: %s", folder, times, len(sources), change)
  level = logging.WARNING if skipped else logging.INFO
  logging.log(
    level,
    "%s: %d of %d videos used, %d skipped, %d clips",
    folder,
    len(sources),
    len(names),
    len(skipped),
    sum(clips for _, _, clips in sources),
  )
  return sources


def read_captions(folder: pathlib.Path) -> dict[str, str]:
  """Returns {file: caption} of the folder's metadata.jsonl or metadata.csv; {} without either.

  Raises:
    UserError: a line that is not JSON, or lacks a column; names the line.
  """
  captions = {}
  for path in (folder / "metadata.jsonl", folder / "metadata.csv"):
    for line, row in enumerate(_rows(path), 1) if path.exists() else ():
      if not (isinstance(row, dict) and isinstance(row.get("file"), str)):
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(
          f"{path}, row {line}: expected the columns file and caption, found {columns}"
        )
      captions[os.path.normpath(row["file"])] = str(row.get("caption") or "").strip()
  return captions


def _rows(path: pathlib.Path) -> list[Any]:
  """Parses metadata.csv (rows as dicts by the header) or metadata.jsonl."""
  try:
    text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark first
    if path.suffix == ".csv":
      return list(csv.DictReader(text.splitlines()))
    return [json.loads(line) for line in text.splitlines() if line.strip()]
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); expected UTF-8: one JSON object a line, or CSV"
    ) from error


def _caption(folder: pathlib.Path, name: str, captions: dict[str, str]) -> str:
  """Returns the caption of a file, from the metadata if there is any, else from the text beside it.

  Raises:
    Unusable: no such video file, no caption, or one that is not UTF-8.
  """
  if not (folder / name).is_file():
    raise video_file.Unusable("named in the metadata, but not there")
  text = folder / pathlib.Path(name).with_suffix(".txt")
  caption = captions.get(name, "")
  if not captions and text.is_file():
    try:
      caption = " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
      raise video_file.Unusable(f"its caption {text.name} is not UTF-8 text") from None
  if not caption:
    place = "in the metadata" if captions else f"in {text.name}"
    raise video_file.Unusable(f"no caption {place}")
  return caption


def fingerprint(folder: pathlib.Path) -> str:
  """Returns a hash of the names and sizes of the videos and captions of a folder."""
  suffixes = (*_SUFFIXES, ".txt", ".csv", ".jsonl")
  files = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
  # Sizes, not contents: a folder of videos may hold terabytes.
  lines = sorted(f"{p.relative_to(folder)} {p.stat().st_size}" for p in files)
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()
