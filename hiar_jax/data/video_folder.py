"""A folder of real videos as a TFDS data set: any container, codec, size and frame rate that FFmpeg
reads.

Captions come from `metadata.jsonl` or `metadata.csv` in the folder (columns file, caption) where
there is one, else from `name.txt` beside `name.mp4`. Files that cannot be used are named, one line
each, and skipped.
"""

from collections.abc import Iterator
import csv
import dataclasses
import hashlib
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


@dataclasses.dataclass(frozen=True)
class ClipFile:
  """One usable file: what it shows and how many clips it gives."""

  path: pathlib.Path
  caption: str
  clips: int


@dataclasses.dataclass
class VideoFolderConfig(tfds.core.BuilderConfig):
  sources: tuple[ClipFile, ...] = ()
  sampling: Sampling | None = None


class VideoFolder(tfds_builder.SequentialBuilder):
  """video uint8 [f, H, W, 3] and caption; the clips of a file in order, files by name."""

  @property
  def count(self) -> int:
    return sum(source.clips for source in self.builder_config.sources)

  @property
  def example_bytes(self) -> int:
    sampling = self.builder_config.sampling
    return sampling.frames * sampling.height * sampling.width * 3

  def features(self) -> dict[str, Any]:
    sampling = self.builder_config.sampling
    return {
      "video": tfds_builder.tensor((sampling.frames, sampling.height, sampling.width, 3), np.uint8),
      "start": tfds_builder.tensor((), np.int32),
      "caption": tfds.features.Text(),
    }

  def examples(self) -> Iterator[dict[str, Any]]:
    for source in self.builder_config.sources:
      sampling = self.builder_config.sampling
      for number, clip in enumerate(video_file.clips(source.path, sampling)):
        yield {
          "video": clip,
          "start": np.int32(number * sampling.stride),
          "caption": source.caption,
        }


def prepare(
  directory: str | os.PathLike,
  source_folder: str | os.PathLike,
  frames: int,
  height: int,
  width: int,
  fps: float,
  stride: int | None = None,
) -> None:
  """Cuts every usable video of a folder into clips of `frames` frames at `fps`, each `stride`
  frames after the last (default: end to end). Returns at once where that is done; later changes of
  the folder are said, not followed.

  Raises:
    UserError: no such folder, no usable video in it, bad metadata, bad sizes, or a directory of
    other settings.
  """
  sampling = Sampling(frames, height, width, fps, stride or frames)
  recipe = {
    "kind": "video folder",
    "folder": os.path.abspath(source_folder),
    **dataclasses.asdict(sampling),
  }
  tfds_builder.check_recipe(directory, recipe, ignore=("files",))
  if tfds_builder.is_complete(directory):
    _say_if_changed(directory, source_folder)
    return
  folder = _existing(source_folder)
  sources = scan(folder, sampling)
  tfds_builder.write_recipe(directory, {**recipe, "files": _fingerprint(folder)})
  config = VideoFolderConfig(name="clips", sources=tuple(sources), sampling=sampling)
  tfds_builder.build(VideoFolder, config, directory)


def _say_if_changed(directory: str | os.PathLike, source_folder: str | os.PathLike) -> None:
  used = tfds_builder.read_recipe(directory)["files"]
  if os.path.isdir(source_folder) and used != _fingerprint(pathlib.Path(source_folder)):
    logging.warning(
      "%s has changed since %s was made from it; delete the latter to use the new files",
      source_folder,
      directory,
    )


def scan(folder: pathlib.Path, sampling: Sampling) -> list[ClipFile]:
  """Decodes every file once: which can be used, and how many clips each gives. Logs a line for each
  that can't.

  Raises:
    UserError: none can be used; says why for the first.
  """
  captions = read_captions(folder)
  names = sorted({*captions, *(str(p.relative_to(folder)) for p in _video_files(folder))})
  sources, skipped = [], []
  for name in tqdm.tqdm(names, "checking videos", unit="file"):
    try:
      caption = _caption(folder, name, captions)
      count = video_file.count_clips(folder / name, sampling)
      sources.append(ClipFile(folder / name, caption, count))
    except (video_file.Unusable, av.error.FFmpegError) as error:
      reason = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
      skipped.append(f"{name}: {reason}")
      logging.warning("skipped %s", skipped[-1])
  if not sources:
    why = (
      f"all {len(skipped)} were skipped, the first as {skipped[0]}"
      if skipped
      else "no video files there"
    )
    raise UserError(
      f"no usable video in {folder} ({why}); it needs clip.mp4 beside clip.txt, or a metadata.jsonl"
    )
  level = logging.WARNING if skipped else logging.INFO
  logging.log(
    level,
    "%s: %d of %d videos used, %d skipped, %d clips",
    folder,
    len(sources),
    len(names),
    len(skipped),
    sum(s.clips for s in sources),
  )
  return sources


def read_captions(folder: pathlib.Path) -> dict[str, str]:
  """file -> caption of the folder's metadata.jsonl or metadata.csv; empty where there is neither.

  Raises:
    UserError: a line that is not JSON, or lacks a column; says which.
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
  """The caption of a file, from the metadata if there is any, else from the text beside it."""
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
    where = "in the metadata" if captions else f"in {text.name}"
    raise video_file.Unusable(f"no caption {where}")
  return caption


def _existing(folder: str | os.PathLike) -> pathlib.Path:
  if not os.path.isdir(folder):
    raise UserError(
      f"{folder} is not a folder; give the folder that holds the videos and their captions"
    )
  return pathlib.Path(folder)


def _video_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  return (p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _fingerprint(folder: pathlib.Path) -> str:
  """Changes when a video or caption is added, removed or replaced by one of another size."""
  wanted = (
    p
    for p in folder.rglob("*")
    if p.suffix.lower() in (*_SUFFIXES, ".txt", ".csv", ".jsonl") and p.is_file()
  )
  lines = sorted(f"{p.relative_to(folder)} {p.stat().st_size}" for p in wanted)
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()
