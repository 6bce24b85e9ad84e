"""A folder of real videos as a TFDS data set: any container, codec, size and frame rate that FFmpeg
reads.

Captions are those of data.captions. Files that cannot be used are skipped, each with a warning;
what begins with a dot, or has an ending that is none of a video, is left out and counted.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import os
import pathlib
from typing import Any

from absl import logging
import av
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from hiar_jax.data import tfds_builder
from hiar_jax.data.captions import Captions
from hiar_jax.errors import UserError
from hiar_jax.video import video_file
from hiar_jax.video.video_file import Sampling

_SUFFIXES = {
  *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
  *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
}
_TEXTS = {".txt", ".csv", ".jsonl"}


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
  made_from = recipe(sampling)
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


def recipe(sampling: Sampling) -> dict[str, Any]:
  """Returns what the clips of a folder are made from, as JSON values; its files aside, which the
  recipe of a made data set holds. Where the folder lies is no part of it: it may be moved.
  """
  return {"kind": "video folder", **dataclasses.asdict(sampling)}


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
      "%s has changed since %s was made from it; use another --workdir to train on the new files",
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
  """Decodes every file once and returns (path, caption, number of clips) of the usable ones, for
  each of a file's captions; logs a warning for each of the others.

  Raises:
    UserError: none can be used; gives the reason for the first.
  """
  files, left_out = _files(folder)
  captions = Captions.read(folder, files)
  # Files that only the metadata names are listed too, so that they are reported as missing.
  names = sorted({*captions.listed, *(name for name in files if _suffix(name) in _SUFFIXES)})
  sources, skipped, changed = [], [], collections.Counter()
  for name in tqdm.tqdm(names, "checking videos", unit="file"):
    try:
      texts = captions.of(name)
      # Headers are often wrong about lengths: the frames are counted by decoding.
      count, changes = video_file.survey(folder / name, sampling)
      changed.update(changes)
      if len(texts) > 1:
        changed["several captions: its clips are there once for each"] += 1
      sources += [(folder / name, text, count) for text in texts]
    except (video_file.Unusable, av.error.FFmpegError) as error:
      reason = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
      skipped.append(f"{name}: {reason}")
      logging.warning("skipped %s", skipped[-1])
  if left_out:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    logging.warning("%s: left out: %s", folder, kinds)
  if not sources:
    reason = "no video files there"
    if skipped:
      reason = f"all {len(skipped)} were skipped, the first as {skipped[0]}"
    raise UserError(
      f"no usable video in {folder} ({reason}); it needs clip.mp4 beside clip.txt, or a "
      "metadata.jsonl"
    )
  used = len(names) - len(skipped)
  for change, times in changed.items():
    logging.warning("%s: %d of %d videos: %s", folder, times, used, change)
  logging.log(
    logging.WARNING if skipped else logging.INFO,
    "%s: %d of %d videos used, %d skipped, %d clips",
    folder,
    used,
    len(names),
    len(skipped),
    sum(clips for _, _, clips in sources),
  )
  return sources


def _files(folder: pathlib.Path) -> tuple[list[str], collections.Counter[str]]:
  """Returns (videos and texts of a folder, by their paths from it; kind of other files -> how
  many).
  """
  files, left_out = [], collections.Counter()
  for path in files_below(folder):
    name = path.relative_to(folder)
    if any(part.startswith(".") for part in name.parts):
      left_out["beginning with a dot"] += 1
    elif _suffix(name) in _SUFFIXES | _TEXTS:
      files.append(str(name))
    else:
      left_out[_suffix(name) or "without an ending"] += 1
  return files, left_out


def _suffix(name: str | os.PathLike) -> str:
  return os.path.splitext(name)[1].lower()


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the files of a folder and of those in it, linked ones too.

  A folder that is reached twice, as by a link to one above it, is listed once, by its own name
  where it lies below `folder`.
  """
  top = os.path.realpath(folder)
  seen = {top}
  for here, names, files in os.walk(folder, followlinks=True):
    entered = []
    for name in sorted(names):
      path = os.path.join(here, name)
      real = os.path.realpath(path)
      # a link to what lies in the tree, or that the tree lies in, leads to what is walked anyway
      back = os.path.islink(path) and os.path.commonpath((top, real)) in (top, real)
      if not back and real not in seen:
        entered.append(name)
        seen.add(real)
    names[:] = entered
    yield from (path for path in (pathlib.Path(here, name) for name in files) if path.is_file())


def fingerprint(folder: pathlib.Path) -> str:
  """Returns a hash of the names and sizes of the videos and captions of a folder."""
  # Sizes, not contents: a folder of videos may hold terabytes.
  lines = sorted(f"{name} {(folder / name).stat().st_size}" for name in _files(folder)[0])
  return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
