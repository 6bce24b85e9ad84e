"""The sources of training data: `data.source` of an experiment.

A new source is a class like those below with a name in SOURCES: it yields captioned clips, or
writes a data set of its own (`prepare`). A field that it needs and DataConfig lacks is added there.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from hiar_jax.config.building import path_field
from hiar_jax.config.workdir import to_json
from hiar_jax.data import pipeline, prompt_texts, shapes_clips, tfds_builder, video_folder
from hiar_jax.data.prompt_rows import read_prompts
from hiar_jax.data.shapes_world import VOCABULARY, WorldConfig
from hiar_jax.errors import MAX_SEED, UserError, above, at_least, one_of, within
from hiar_jax.types import DTYPES
from hiar_jax.video.video_file import Sampling


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The training data.

  source: `shapes`, clips of the shapes world; `videos`, those of a folder: any window of a film is
  a clip, drawn anew each epoch; `prompts`, prompts without videos, for distillation from a teacher
  that exists. Clips of a published codec are stored as latents, and cut from a film end to end.
  """

  source: str = "shapes"
  frames: int = 9  # pixel frames of a clip
  size: int | tuple[int, int] = 32  # pixels of a frame: one number or (height, width)
  # of `shapes`
  seed: int = 0
  difficulty: str = "plain"
  later: float = 0.0  # share of clips cut from further on in a video (WorldConfig)
  shape_size: float = dataclasses.field(default=1.0, metadata={"since": "2026-11"})
  pace: float = dataclasses.field(default=1.0, metadata={"since": "2026-11"})
  hidden: int = dataclasses.field(default=0, metadata={"since": "2026-11"})  # frames (WorldConfig)
  clips: int = 4096
  # of `videos`
  folder: str = path_field()
  fps: float = 8.0  # videos are resampled to it
  # share of each film, its end, that is kept from training, to measure on
  held_out: float = dataclasses.field(default=0.0, metadata={"since": "2026-11"})
  # of clips that are stored as latents: frames from the start of one to that of the next; 0: frames
  stride: int = dataclasses.field(default=0, metadata={"since": "2026-11"})
  # of `prompts`
  prompts: str = path_field()  # a file (data.prompt_rows)
  # of clips that are stored as latents (data.latents)
  latent_dtype: str = dataclasses.field(default="float32", metadata={"since": "2026-11"})

  def __post_init__(self):
    one_of(DTYPES, **{"data.latent_dtype": self.latent_dtype})
    at_least(1, clips=self.clips, frames=self.frames, height=self.height, width=self.width)
    above(0, fps=self.fps)
    at_least(0, stride=self.stride)
    if not 0 <= self.held_out < 1:
      raise UserError(f"data.held_out = {self.held_out}: expected a share, at least 0, less than 1")
    within(0, MAX_SEED, seed=self.seed)
    one_of(SOURCES, **{"data.source": self.source})
    self.opened.check()

  @property
  def opened(self) -> "Source":
    """The source that `source` names, with these settings."""
    return SOURCES[self.source](self)

  @property
  def height(self) -> int:
    return self.size if isinstance(self.size, int) else self.size[0]

  @property
  def width(self) -> int:
    return self.size if isinstance(self.size, int) else self.size[1]


@dataclasses.dataclass(frozen=True)
class Found:
  """The clips that a source has found.

  read: number of the first -> that clip and those after it, {video uint8 [F H W 3], start, caption}
  each. recipe: what the source's own did not know yet.
  """

  count: int
  read: Callable[[int], Iterator[Mapping[str, Any]]]
  recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
  """Base of the sources.

  captions_only: True where there are no clips, and so no teacher or codec can be trained on them.
  words: all that a caption may hold, in the order of their ids; (): those that the captions hold.
  """

  data: DataConfig
  captions_only: ClassVar[bool] = False
  words: ClassVar[tuple[str, ...]] = ()

  def check(self) -> None:
    """Raises UserError where a field that this source needs is not given."""

  def count(self, directory: pathlib.Path) -> tuple[float, str]:
    """Returns (number of examples, the field that sets it), before they are made; infinity where
    that is not known. Raises UserError where `prepare` could not run.
    """
    return self.data.clips, "data.clips"

  def prepare(self, directory: pathlib.Path, text_encoder: Callable[[], Any]) -> None:
    """Writes the data set to `directory`, by default of `clips`; does nothing where it is complete.

    text_encoder: opens the run's, which may be fitted on captions only after this.
    """
    data, count = self.data, int(self.count(directory)[0])
    if self.is_made(directory, self.recipe):
      return
    tfds_builder.write_recipe(directory, self.recipe)
    shape = (data.frames, data.height, data.width, 3)
    features = {
      "video": tfds_builder.tensor(shape, np.uint8),
      "start": tfds_builder.tensor((), np.int32),
      "caption": tfds.features.Text(),
    }
    tfds_builder.build(
      directory,
      "captioned_clips/clips",
      features,
      self._records(),
      count=count,
      example_bytes=math.prod(shape),
    )

  def _records(self, first: int = 0) -> Iterator[Mapping[str, Any]]:
    clips = itertools.islice(self.clips(), first, None)
    return ({"video": x, "start": np.int32(0), "caption": text} for x, text in clips)

  @property
  def recipe(self) -> dict[str, Any]:
    """What the clips are made from, as JSON values."""
    return {"kind": self.data.source, **to_json(self.data)}

  def is_made(self, directory: pathlib.Path, recipe: Mapping[str, Any]) -> bool:
    """Returns True where a data set made by `recipe` is complete.

    Raises UserError where the directory holds one of another recipe.
    """
    tfds_builder.check_recipe(directory, recipe, ignore=tfds_builder.OF_PARTS)
    return tfds_builder.is_complete(directory)

  def renamed(self, directory: pathlib.Path) -> tuple[str, ...]:
    """Returns the fields that may differ from those that the data set in `directory` was made with,
    because it tells by what they lead to that this is the same.
    """
    return ()

  def find(self) -> Found:
    """Finds the clips, for a data set that is not of pixels. Raises UserError where none are."""
    return Found(self.data.clips, self._records)

  def clips(self) -> Iterator[tuple[np.ndarray, str]]:
    """Yields `count` clips uint8 [F H W 3] with their captions."""
    raise NotImplementedError

  def captions(self, directory: pathlib.Path) -> list[str]:
    """Returns the caption of every example, of the data set in `directory`."""
    return pipeline.read_captions(directory)

  @property
  def world(self) -> WorldConfig | None:
    """The shapes world that the clips are drawn from, whose truth videos can be measured against;
    None for any other source.
    """
    return None


class Shapes(Source):
  """Clips of the shapes world."""

  words = VOCABULARY

  def count(self, directory: pathlib.Path) -> tuple[float, str]:
    self.world  # noqa: B018  # raises where such a world cannot be
    return super().count(directory)

  def prepare(self, directory: pathlib.Path, text_encoder) -> None:
    shapes_clips.prepare(directory, self.world, self.data.clips, self.data.seed)

  @property
  def recipe(self) -> dict[str, Any]:
    return shapes_clips.recipe(self.world, self.data.clips, self.data.seed)

  def find(self) -> Found:
    data, world = self.data, self.world
    of = functools.partial(shapes_clips.make_clip, world, data.seed)
    return Found(data.clips, lambda first: map(of, range(first, data.clips)))

  @property
  def world(self) -> WorldConfig:
    data = self.data
    if data.height != data.width:
      raise UserError(f"data.size = {data.size}: the shapes world is square, give one number")
    names = ("frames", "difficulty", "later", "shape_size", "pace", "hidden")
    return WorldConfig(size=data.height, **{name: getattr(data, name) for name in names})


class Videos(Source):
  """The videos of a folder."""

  def check(self) -> None:
    if not self.data.folder:
      raise UserError(
        "data.source = 'videos' needs data.folder, a folder of clips (clip.mp4 beside clip.txt)"
      )

  def count(self, directory: pathlib.Path) -> tuple[float, str]:
    folder = self.data.folder
    if not os.path.isdir(folder) and not tfds_builder.is_complete(directory):
      raise UserError(
        f"data.folder = {folder!r} is not a folder; give the one that holds the clips and their "
        "captions"
      )
    if tfds_builder.is_complete(directory):
      return pipeline.count_clips(directory), "the clips of data.folder"
    return math.inf, "data.clips"  # counted only when the data stage has cut the videos

  def prepare(self, directory: pathlib.Path, text_encoder) -> None:
    video_folder.prepare(directory, self.data.folder, self._cut)

  @property
  def _cut(self) -> video_folder.Cut:
    data = self.data
    stride = data.stride or data.frames
    sampling = Sampling(data.frames, data.height, data.width, data.fps, stride)
    return video_folder.Cut(sampling, held_out=data.held_out)

  @property
  def recipe(self) -> dict[str, Any]:
    return video_folder.recipe(self._cut)

  def is_made(self, directory: pathlib.Path, recipe: Mapping[str, Any]) -> bool:
    return video_folder.is_made(directory, self.data.folder, recipe)

  def renamed(self, directory: pathlib.Path) -> tuple[str, ...]:
    folder, recipe = pathlib.Path(self.data.folder), tfds_builder.read_recipe(directory) or {}
    # the same folder, moved or mounted elsewhere
    same = folder.is_dir() and video_folder.fingerprint(folder) == recipe.get("files")
    return ("data.folder",) if same else ()

  def find(self) -> Found:
    folder, cut = pathlib.Path(self.data.folder), dataclasses.replace(self._cut, pieces=False)
    films = video_folder.scan(folder, cut)
    read = functools.partial(video_folder.records, films, cut)
    files = {"files": video_folder.fingerprint(folder)}
    return Found(sum(len(film.records) for film in films), read, files)


class Prompts(Source):
  """The prompts of a file, with their encoded texts."""

  captions_only = True

  def check(self) -> None:
    if not self.data.prompts:
      raise UserError("data.source = 'prompts' needs data.prompts, a file with one prompt a line")

  def count(self, directory: pathlib.Path) -> tuple[float, str]:
    return len(read_prompts(self.data.prompts)), "the prompts of data.prompts"

  def prepare(self, directory: pathlib.Path, text_encoder) -> None:
    # Encoded first, all at once: the data set then stores the texts beside the prompts.
    encoder = text_encoder()
    encoder.prepare([*read_prompts(self.data.prompts, say=True), encoder.negative_prompt])
    prompt_texts.prepare(directory, self.data.prompts, encoder)

  def renamed(self, directory: pathlib.Path) -> tuple[str, ...]:
    path, recipe = self.data.prompts, tfds_builder.read_recipe(directory) or {}
    same = os.path.isfile(path) and prompt_texts.digest(read_prompts(path)) == recipe.get("digest")
    return ("data.prompts",) if same else ()

  def captions(self, directory: pathlib.Path) -> list[str]:
    return read_prompts(self.data.prompts)


# `data.source` of a config -> class
SOURCES: dict[str, type[Source]] = {
  "shapes": Shapes,
  "videos": Videos,
  "prompts": Prompts,
}
