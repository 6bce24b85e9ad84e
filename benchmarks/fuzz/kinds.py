"""What is broken and who reads it: a kind has files that are right, ways to break them, and the
reader that commands, the page and Python use.

A reader may return, or raise UserError; whatever else happens is a finding.
"""

from collections.abc import Callable
import pathlib

import av
import numpy as np
from PIL import Image

from benchmarks.fuzz import models, mutations, weights, worker
from benchmarks.fuzz.models import one_of
from benchmarks.fuzz.mutations import Dice
from benchmarks.fuzz.worker import Kind
from hiar_jax.config.building import build, walk
from hiar_jax.config.command_line import load_config
from hiar_jax.data import prompt_rows, video_folder
from hiar_jax.data.captions import Captions
from hiar_jax.errors import UserError
from hiar_jax.generation import prompts_file, timeline
from hiar_jax.training.experiment import Experiment
from hiar_jax.video import conditioning_files, mp4, video_file
from hiar_jax.video.isolated_reader import IsolatedReader, Limits

ROOT = pathlib.Path(__file__).parents[2]
SIZE = 16


# ------------------------------------------------------------------------------ videos and pictures


def frames(count: int = 12) -> np.ndarray:
  at = np.arange(SIZE)
  rows = [np.sin((at[None] + at[:, None] + i) / 3)[..., None] * [90, 60, 30] for i in range(count)]
  return np.rint(128 + np.stack(rows)).astype(np.uint8)


def make_videos(folder: pathlib.Path) -> None:
  mp4.write_mp4(folder / "a.mp4", frames(), 8, {"prompt": "waves"})
  made = {"b.mkv": ("ffv1", "bgr0"), "c.gif": ("gif", "rgb8"), "d.webm": ("libvpx", "yuv420p")}
  for name, (codec, pixels) in made.items():
    with av.open(str(folder / name), "w") as container:
      stream = container.add_stream(codec, rate=8)
      stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixels
      for frame in frames():
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
      container.mux(stream.encode())


def make_pictures(folder: pathlib.Path) -> None:
  picture = Image.fromarray(frames(1)[0])
  for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tiff", "f.gif"):
    picture.save(folder / name)


def broken_file(right: pathlib.Path, place: pathlib.Path, dice: Dice) -> pathlib.Path:
  path = one_of(right, dice)
  data = path.read_bytes()
  other = one_of(right, dice).read_bytes()
  made = (
    mutations.spliced(data, other, dice) if dice.random() < 0.2 else mutations.mutated(data, dice)
  )
  (place / path.name).write_bytes(made)
  return place / path.name


def read_upload(path: pathlib.Path) -> None:
  """As the page does, in a process of its own."""
  reader = IsolatedReader(Limits(seconds=15.0))
  try:
    if path.suffix in (".mp4", ".mkv", ".webm"):
      reader.read_video(path, SIZE, SIZE, 8.0, 9)
    else:
      reader.read_image(path, SIZE, SIZE)
  finally:
    reader.close()


def read_video(path: pathlib.Path) -> None:
  """As generate and stream do, and as a folder of training films."""
  try:
    conditioning_files.read_video(path, SIZE, SIZE, 8.0, 9)
  finally:
    mp4.read_metadata(path)
    path.with_suffix(".txt").write_text("waves")
    sampling = video_file.Sampling(4, SIZE, SIZE, 8.0, 4)
    video_folder.scan(path.parent, video_folder.Cut(sampling))


def read_picture(path: pathlib.Path) -> None:
  conditioning_files.read_image(path, SIZE, SIZE)


# ------------------------------------------------------------------------------------------- texts

PROMPTS = "# list\na red circle moving left\nseed=7 out=b.mp4 | a dog, running: fast\n\n"
ROWS = '{"prompt": "a cat", "seed": 3}\n{"prompt": "a dog", "out": "b.mp4"}\n'
TABLE = 'prompt,seed,out\n"a cat, sitting",3,a.mp4\na dog,,\n'
TIMES = "0s: a red circle moving left, 10s: a blue square\n1m30s recache: a green star; 2:30: a dog"
METADATA = '{"file": "a.mp4", "caption": "waves"}\n{"file": "b.mp4", "caption": "more"}\n'


def texts(*files: tuple[str, str]) -> Callable[[pathlib.Path], None]:
  def make(folder: pathlib.Path) -> None:
    for name, text in files:
      (folder / name).write_text(text)

  return make


def broken_text(right: pathlib.Path, place: pathlib.Path, dice: Dice) -> pathlib.Path:
  path = one_of(right, dice)
  (place / path.name).write_bytes(mutations.rewritten(path.read_text(), dice))
  return place / path.name


def read_prompts(path: pathlib.Path) -> None:
  """As training and generate do."""
  try:
    prompt_rows.read_prompts(path, say=True)
  finally:
    prompts_file.read_jobs(path, 3)


def read_timeline(path: pathlib.Path) -> None:
  timeline.read(path).changes(lambda block: 0.375 * block)


def read_captions(path: pathlib.Path) -> None:
  Captions.read(path.parent, ["a.mp4", "b.mp4"])


# ----------------------------------------------------------------------------------------- configs


def broken_config(right: pathlib.Path, place: pathlib.Path, dice: Dice):
  """(field, value) of one to three fields of a config."""
  del right, place
  names = [name for name, _ in walk(load_config(f"{ROOT}/experiments/shapes.py:smoke"))]
  return [
    (names[dice.integers(len(names))], mutations.value(dice)) for _ in range(dice.integers(1, 4))
  ]


def read_config_values(changes) -> None:
  config = load_config(f"{ROOT}/experiments/shapes.py:smoke")
  for name, value in changes:
    *groups, last = name.split(".")
    at = config
    for group in groups:
      at = at[group]
    try:
      at[last] = value
    except (TypeError, OverflowError) as error:  # the config's own: it knows the field's type
      raise UserError(str(error)) from error
  build(Experiment, config)


KINDS = {
  "upload": Kind(make_videos, broken_file, read_upload),
  "video": Kind(make_videos, broken_file, read_video),
  "picture": Kind(make_pictures, broken_file, read_picture),
  "prompts": Kind(
    texts(("a.txt", PROMPTS), ("b.jsonl", ROWS), ("c.csv", TABLE)), broken_text, read_prompts
  ),
  "timeline": Kind(texts(("a.txt", TIMES)), broken_text, read_timeline),
  "captions": Kind(texts(("metadata.jsonl", METADATA)), broken_text, read_captions),
  "config": Kind(texts(), broken_config, read_config_values),
  "python": Kind(models.make_door, models.broken_call, models.call),
  "run": Kind(models.make_run, models.broken_run, models.read_run),
  "shards": Kind(weights.make_shards, weights.broken_shards, weights.read),
  "stream": Kind(models.make_stream, models.broken_stream, models.read_stream),
  "torch": Kind(weights.make_torch, weights.broken_torch, weights.read),
  "weights": Kind(weights.make, broken_file, weights.read),
}

if __name__ == "__main__":
  worker.serve(KINDS)
