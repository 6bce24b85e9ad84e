"""A folder of real videos as a TFDS data set: any container, codec, size and frame rate that FFmpeg
reads.

Captions are those of data.captions. Files that cannot be used are skipped, each with a warning;
what begins with a dot, or has an ending that is none of a video, is left out and counted.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math
import os
import pathlib
import shutil
import sys
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
HELD_OUT = "held_out"  # folder of the data set's directory


@dataclasses.dataclass(frozen=True)
class Cut:
  """How films become records.

  sampling: of the clips. pieces: True for records from which any window may be taken, False for
  clips. held_out: the share of each film, its end, that is kept from training.
  """

  sampling: Sampling
  pieces: bool = True
  held_out: float = 0.0


@dataclasses.dataclass(frozen=True)
class CutFilm:
  """A usable file: its caption, (first frame, windows) of each of its records, and the first frames
  of its held-out clips.
  """

  path: pathlib.Path
  caption: str
  records: Sequence[tuple[int, int]]
  held_out: Sequence[int]


def prepare(directory: str | os.PathLike, source_folder: str | os.PathLike, cut: Cut) -> None:
  """Writes pieces of every usable video of a folder, any window of which is a clip.

  A film of N frames has N - F + 1 windows of F frames. They are shared out evenly to pieces of at
  most F. A record is {video uint8 [2 F - 1, H, W, 3], windows int32 [], start int32 [], caption}:
  `windows` windows begin at its first frames, the first at frame `start` of the film; what lies
  behind the last one is its last frame again. Held-out clips are a data set of their own in
  directory/held_out, {video uint8 [F, H, W, 3], start, caption}.

  Does nothing if the data set is complete; warns if the folder has changed since.

  Raises:
    UserError: no such folder, no usable video in it, bad metadata, bad sizes, or a directory of
      other settings.
  """
  made_from = recipe(cut)
  if is_made(directory, source_folder, made_from):
    return
  folder = pathlib.Path(source_folder)
  films = scan(folder, cut)
  tfds_builder.write_recipe(directory, {**made_from, "files": fingerprint(folder)})
  held = [dataclasses.replace(x, records=[(at, 1) for at in x.held_out]) for x in films]
  whole = dataclasses.replace(cut, pieces=False)
  # what a run that was stopped has left may be of other files
  shutil.rmtree(pathlib.Path(directory) / HELD_OUT, ignore_errors=True)
  if any(film.held_out for film in films):
    _build(pathlib.Path(directory) / HELD_OUT, "video_folder/held_out", held, whole)
  _build(directory, "video_folder/clips", films, cut)  # last: with it all is complete


def _build(directory: str | os.PathLike, name: str, films: Sequence[CutFilm], cut: Cut) -> None:
  sampling = cut.sampling
  shape = (2 * sampling.frames - 1 if cut.pieces else sampling.frames, *sampling.size, 3)
  scalar = tfds_builder.tensor((), np.int32)
  features = {
    "video": tfds_builder.tensor(shape, np.uint8),
    **({"windows": scalar} if cut.pieces else {}),
    "start": scalar,
    "caption": tfds.features.Text(),
  }
  count = sum(len(film.records) for film in films)
  made = records(films, cut)
  tfds_builder.build(directory, name, features, made, count=count, example_bytes=math.prod(shape))


def recipe(cut: Cut) -> dict[str, Any]:
  """Returns what the clips of a folder are made from, as JSON values; its files aside, which the
  recipe of a made data set holds. Where the folder lies is no part of it: it may be moved.
  """
  made_from = {"kind": "video folder", **dataclasses.asdict(cut.sampling)}
  held_out = {"held_out": cut.held_out} if cut.held_out else {}
  return {**made_from, "cut": "pieces" if cut.pieces else "clips", **held_out}


def is_made(
  directory: str | os.PathLike, source_folder: str | os.PathLike, made_from: Mapping[str, Any]
) -> bool:
  """Returns True where a data set made by this recipe is complete; warns if the folder has changed
  since.

  Raises:
    UserError: a directory of another recipe, or no such folder where it is needed.
  """
  complete = tfds_builder.is_complete(directory)
  # an earlier version cut films end to end and said nothing of it; what it has made is taken
  stored = tfds_builder.read_recipe(directory) or {}
  former = ("cut",) if complete and "cut" not in stored else ()
  tfds_builder.check_recipe(directory, made_from, ignore=(*tfds_builder.OF_PARTS, *former))
  folder = pathlib.Path(source_folder)
  if not complete:
    if not folder.is_dir():
      raise UserError(
        f"{source_folder} is not a folder; give the folder that holds the videos and their captions"
      )
    return False
  # The folder itself is no longer needed, and may be gone.
  if folder.is_dir() and stored["files"] != fingerprint(folder):
    logging.warning(
      "%s has changed since %s was made from it; use another --workdir to train on the new files",
      source_folder,
      directory,
    )
  return True


def records(films: Sequence[CutFilm], cut: Cut, first: int = 0) -> Iterator[dict[str, Any]]:
  """Yields the records of films (`scan`) from number `first` on, as `prepare` stores them."""
  frames = cut.sampling.frames
  for film in films:
    wanted = film.records[first:]
    first = max(0, first - len(film.records))
    if not wanted:
      continue
    # a file is only read forwards: what lies before its first record is decoded too
    spans = [(at, windows + frames - 1) for at, windows in wanted]
    read = video_file.spans(film.path, cut.sampling, spans)
    for (at, windows), video in zip(wanted, read, strict=True):
      record = {"video": video, "start": np.int32(at), "caption": film.caption}
      if cut.pieces:
        filled = np.arange(2 * frames - 1).clip(max=len(video) - 1)
        record |= {"video": video[filled], "windows": np.int32(windows)}
      yield record


def scan(folder: pathlib.Path, cut: Cut) -> list[CutFilm]:
  """Decodes every file once and returns the usable ones, once for each of a file's captions; logs a
  warning for each of the others.

  Raises:
    UserError: none can be used; gives the reason for the first.
  """
  files, left_out = _files(folder)
  captions = Captions.read(folder, files)
  # Files that only the metadata names are listed too, so that they are reported as missing.
  names = sorted({*captions.listed, *(name for name in files if _suffix(name) in _SUFFIXES)})
  films, skipped, said = [], [], collections.Counter()
  still = 0
  for name in tqdm.tqdm(names, "checking videos", unit="file"):
    try:
      texts = captions.of(name)
      # Headers are often wrong about lengths: the frames are counted by decoding.
      moves, changes = video_file.survey(folder / name, cut.sampling)
      made, held_out, as_before = _cut(moves, cut)
      still += as_before
      said.update(changes)
      if cut.held_out and not held_out:
        said["too short to hold out a clip: all of it is trained on"] += 1
      if len(texts) > 1:
        said["several captions: its clips are there once for each"] += 1
      films += [CutFilm(folder / name, text, made, held_out) for text in texts]
    except (video_file.Unusable, av.error.FFmpegError) as error:
      reason = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
      skipped.append(f"{name}: {reason}")
  for why in skipped:  # only now: lines would break the bar
    logging.warning("skipped %s", why)
  if left_out:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    logging.warning("%s: left out: %s", folder, kinds)
  if not films:
    reason = "no video files there"
    if skipped:
      reason = f"all {len(skipped)} were skipped, the first as {skipped[0]}"
    raise UserError(
      f"no usable video in {folder} ({reason}); it needs clip.mp4 beside clip.txt, or a "
      "metadata.jsonl"
    )
  used = len(names) - len(skipped)
  for what, times in said.items():
    logging.warning("%s: %d of %d videos: %s", folder, times, used, what)
  if still:
    logging.warning(
      "%s: %d clips stand still and show what the one before shows: left out", folder, still
    )
  clips = sum(windows for film in films for _, windows in film.records)
  print(
    f"{folder}: {used} of {len(names)} videos used, {len(skipped)} skipped, {clips} clips",
    file=sys.stderr,
  )
  return films


def _cut(moves: np.ndarray, cut: Cut) -> tuple[list[tuple[int, int]], list[int], int]:
  """Returns (records, first frames of held-out clips, clips that were left out as still) of a film
  whose frames move so (video_file.survey); as CutFilm has them.
  """
  sampling, total = cut.sampling, len(moves)
  frames = sampling.frames
  # at least one clip, and one to train on
  end = min(total - round(cut.held_out * total), total - frames) if cut.held_out else total
  end = end if end >= frames else total
  held_out = list(range(end, total - frames + 1, frames))
  first, still = video_file.starts(moves[:end], frames, 1 if cut.pieces else sampling.stride)
  if not cut.pieces:
    return [(int(at), 1) for at in first], held_out, still
  runs = np.split(first, np.flatnonzero(np.diff(first) > 1) + 1)
  # evenly, so that all windows are drawn about as often
  parts = [part for run in runs for part in np.array_split(run, -(-len(run) // frames))]
  return [(int(part[0]), len(part)) for part in parts], held_out, still


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
