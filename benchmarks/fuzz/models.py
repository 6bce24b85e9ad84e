"""Runs, streams that were saved, and the arguments of hiar_jax.load and its model's methods."""

import functools
import json
import pathlib
import shutil

from etils import epath
import jax
import numpy as np
from PIL import Image

from benchmarks.fuzz import mutations
from benchmarks.fuzz.mutations import Dice
import hiar_jax
from hiar_jax import stream as streams
from hiar_jax.checkpoints import checksums
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.config.command_line import load_config
from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.model import Model
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.streaming.producer import Stream
from hiar_jax.streaming.streaming_model import StreamingModel
from hiar_jax.training import pretrained
from hiar_jax.training.run import open_run, read_config
from hiar_jax.video.fragmented_mp4 import FragmentedMP4

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "a red circle moving left"


def one_of(folder: pathlib.Path, dice: Dice) -> pathlib.Path:
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return files[dice.integers(len(files))]


# --------------------------------------------------------------------------------------------- runs


def make_run(folder: pathlib.Path) -> None:
  """A run with weights, as training leaves it."""
  config = load_config(f"{ROOT}/experiments/shapes.py:smoke")
  config.model.update(dim=16, ffn_dim=16, num_layers=1, num_heads=1, freq_dim=16)
  config.codec.channels = 8
  directory = folder / "run"
  save_resolved(config, directory)
  run = open_run(config, directory, save=False)
  clips = np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32, 3), np.uint8)
  run.experiment.codec.fit(run.directory("data"), lambda: clips)
  params = run.experiment.dit.init(jax.random.key(0))
  with Checkpoints(run.directory("distill") / "checkpoints") as checkpoints:
    checkpoints.save(config.distill.steps, {"step": np.ones(())}, params)


def break_files(folder: pathlib.Path, dice: Dice) -> None:
  """Breaks one or two of them."""
  for _ in range(int(dice.integers(1, 3))):
    path = one_of(folder, dice)
    kind = int(dice.integers(4))
    if kind == 0:
      path.unlink()
    elif kind == 1:
      path.write_bytes(b"")
    elif kind == 2 and path.suffix == ".json":
      path.write_bytes(mutations.rewritten(path.read_text(errors="replace"), dice))
    else:
      path.write_bytes(mutations.mutated(path.read_bytes(), dice))


def broken_run(right: pathlib.Path, place: pathlib.Path, dice: Dice) -> pathlib.Path:
  shutil.copytree(right / "run", place / "run")
  break_files(place / "run", dice)
  return place / "run"


def read_run(directory: pathlib.Path) -> None:
  """As generate and stream open it."""
  run = open_run(read_config(str(directory)), directory, save=False)
  run.autoencoder  # noqa: B018
  pretrained.load_weights(run, "distill")


# ------------------------------------------------------------------------------------------ streams


@functools.cache
def source(directory: pathlib.Path) -> StreamingModel:
  """The model of a run, to stream with."""
  return StreamingModel(hiar_jax.load(directory))


def make_stream(folder: pathlib.Path) -> None:
  """A stream that was saved after two chunks, with its file."""
  make_run(folder)
  made = folder / "made"
  model = source(folder / "run")
  with model.open(PROMPT, frames=12) as stream, FragmentedMP4(folder / "a.mp4", model.fps) as file:
    for _ in range(2):
      file.write(next(stream).frames)
    stream.change_prompt("a blue square")
    stream.save(made / "saved")
  (folder / "a.mp4").rename(made / f"{file.frames}.mp4")


def broken_values(text: str, dice: Dice) -> bytes:
  """A JSON group of which a value is another or gone, or its text is broken."""
  found = json.loads(text)
  group = found if dice.random() < 0.6 else found[("options", "text")[dice.integers(2)]]
  keys = sorted(group)
  key, odd = keys[dice.integers(len(keys))], mutations.value(dice)
  change = dice.random()
  if change < 0.3:
    return mutations.rewritten(text, dice)
  if change < 0.5:
    del group[key]
  elif change < 0.6:
    group[f"{key}s"] = group.pop(key)
  elif change < 0.8 and isinstance(group[key], list) and group[key]:
    group[key][dice.integers(len(group[key]))] = odd
  else:
    group[key] = odd
  return json.dumps(found).encode()


def broken_stream(right: pathlib.Path, place: pathlib.Path, dice: Dice):
  """(a model, a folder with a snapshot and a file); checksums may be those of what was broken."""
  shutil.copytree(right / "made", place / "made")
  saved = place / "made" / "saved"
  if dice.random() < 0.4:  # what describes the snapshot
    (described,) = saved.glob("*/config/metadata")
    described.write_bytes(broken_values(described.read_text(), dice))
  else:
    break_files(place / "made", dice)
  steps = [path for path in saved.glob("*") if path.is_dir()]
  if dice.random() < 0.7:
    for step in steps:
      checksums.write(epath.Path(step))
  return right / "run", place / "made"


def read_stream(given) -> None:
  """As --resume does, but for the blocks that come after it."""
  run, folder = given
  model = source(run)
  try:
    generation = LiveVideo.restore(folder / "saved", model.engine)
    latents = (1, model.engine.block, *model.engine.frame)
    Stream.resume(generation, model.decoder, latents, fps=model.fps, blocks=0).close()
  finally:
    for path in folder.glob("*.mp4"):
      with FragmentedMP4(path, model.fps, keep=int(path.stem)):
        pass


# ------------------------------------------------------------------------------ arguments in Python

ODD = (
  *mutations.VALUES,
  *(np.int64(3), np.uint8(200), np.float32("nan"), np.float64(2.0), np.bool_(True), np.array(3)),
  *(np.arange(3), np.array(["a", "b"]), np.zeros((2, 3)), np.zeros((3, 4, 4, 8)), 1j, b"x"),
  *(np.zeros((4, 32, 32, 3), np.uint8), np.full((2, 4, 4, 8), np.nan), np.array([None, "a"])),
  *(
    pathlib.Path("nowhere.png"),
    pathlib.Path("/"),
    "/dev/null",
    "~",
    "a\x00b",
    "\ud83d",
    "İ" * 300,
  ),
  *({1}, range(3), range(0), object(), int, len, ..., frozenset(), bytearray(b"ab"), 12, 4096),
  *(["a", "b"], ("a", 3), ["a", None], [0, 2**32], [[0], [1]], {0: 1}, {"0": 1}, {0: "x"}, "0:1"),
)
NAMES = ("prompts", "frames", "seed", "image", "video", "end_image", "end_video", "loop", "order")
VIDEO = {**dict.fromkeys((*NAMES, "timeline", "takes")), "prompts": PROMPT, "frames": 8, "seed": 0}
STREAM = ("timeline", "image", "video", "seed", "resume", "level_devices", "tensor_devices")
STREAM = (*STREAM, "sequence_devices", "window", "sink", "sink_positions", "prefetch", "ahead")
LOAD = ("workdir", "config", "weights", "stage", "step", "height", "width", "dtype", "decoder")
METHOD = ("block", "window", "sink", "level", "order", "gradient", "past", "packing", "sink_level")
# a function -> arguments that are right; None: one that is left out unless it is drawn
DOOR = {
  "generate": {**VIDEO, "loop": False},
  "sample_latents": {**{"seeds" if n == "seed" else n: x for n, x in VIDEO.items()}, "loop": False},
  "watch": {**{"prompt" if n == "prompts" else n: x for n, x in VIDEO.items()}, "loop": False},
  "texts": {"prompts": [PROMPT]},
  "decode": {"latents": np.zeros((3, 4, 4, 8), np.float32)},
  "encode": {"frames": np.zeros((4, 32, 32, 3), np.uint8)},
  "with_method": dict.fromkeys((*METHOD, "nothing")),
  "load": dict.fromkeys((*LOAD, "tile")),
  "stream": {**dict.fromkeys(STREAM), "prompt": PROMPT, "frames": 8},
}


class Quick(Model):
  """A model whose videos are grey, at once: what is read here are its arguments."""

  def sampler(self, frames: int, **sections):
    if frames > 10_000:
      raise UserError("more than the memory of this machine")
    latent = self.experiment.latent

    def generate(params, texts, seeds, given=None, behind=None):
      count = frames + sum(x.shape[1] for x in (given, behind) if x is not None)
      return np.zeros((len(texts), count, latent.height, latent.width, latent.channels), np.float32)

    return generate


@functools.cache
def quick(directory: pathlib.Path) -> Quick:
  model = hiar_jax.load(directory)
  return Quick(model.run, model.weights, model.stage, model.load_once, step=model.step)


def make_door(folder: pathlib.Path) -> None:
  make_run(folder)
  Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(folder / "a.png")


def broken_call(right: pathlib.Path, place: pathlib.Path, dice: Dice):
  """(a run's directory, the name of a function, its arguments with one to three odd ones)."""
  del place
  name = sorted(DOOR)[dice.integers(len(DOOR))]
  given = {key: value for key, value in DOOR[name].items() if value is not None}
  for _ in range(int(dice.integers(1, 4))):
    keys = sorted(DOOR[name])
    given[keys[dice.integers(len(keys))]] = mutations.value(dice, ODD)
  if "image" in given and dice.random() < 0.3:
    given["image"] = right / "a.png"
  return right / "run", name, given


def call(given) -> None:
  """As a notebook does. A stream's options are read, and none is opened."""
  directory, name, arguments = given
  if name == "load":
    hiar_jax.load(**{"workdir": directory, **arguments})
  elif name == "stream":
    streams.read_options(arguments)
  elif name == "with_method":
    quick(directory).with_method(**arguments).method  # noqa: B018
  else:
    made = getattr(quick(directory), name)(**arguments)
    if name == "watch":
      list(made)
