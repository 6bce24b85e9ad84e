"""What benchmarks.same runs: the commands of each part in order, and the files they start from.

Only what is meant to stay is used: the command lines, and names and keys of experiments/.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import numpy as np
from PIL import Image

EXPERIMENTS = "{tree}/experiments"  # `{tree}` stands for the directory of the tree that runs

# Every stage in seconds: compiling is what takes time.
SMALL = {
  "data.clips": 16,
  "data.size": 16,
  "data.frames": 6,
  "history.block": 2,
  "history.window": 4,
  "codec.channels": 8,
  "text.dim": 8,
  "text.length": 12,
  "model.dim": 16,
  "model.ffn_dim": 16,
  "model.num_layers": 2,
  "model.num_heads": 2,
  "model.freq_dim": 16,
  "teacher.steps": 6,
  "teacher.batch": 4,
  "trajectories.count": 6,
  "trajectories.batch": 4,
  "trajectories.steps": 4,
  "causal_init.steps": 4,
  "causal_init.batch": 4,
  "distill.steps": 6,
  "distill.batch": 4,
  "distill.critic_updates": 2,
  "sample.count": 3,
  "sample.measure": 3,
  "sample.batch": 2,
  "log.every": 1,
  "log.checkpoint_every": 2,
  "log.preview_every": 3,
}

# What the methods do not fix is spread over them: more of the code is run by as many commands.
SETTINGS = {
  "hiar": {},
  "self_forcing": {
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.merge_tokens": False,
    "teacher.accumulate": 2,
    "causal_init.shows": "noisy",
    "distill.guidance": 3.0,
    "mesh.mapping": "pmap",
  },
  "self_aligned": {
    "history.window": 6,
    "history.sink": 2,
    "history.renoise": "euler",
    "data.difficulty": "textured",
    "model.unroll": 2,
    "trajectories.guidance": 2.0,
    "teacher.rule": "adamw",
  },
}

CONFIGS = {
  "hiar": "shapes.py",
  "self_forcing": "shapes_self_forcing.py",
  "self_aligned": "shapes_self_aligned.py",
}

RED, BLUE, GREEN = "a red circle moving left", "a blue square moving up", "a green star moving down"
DAY = f"0s: {RED}, 1s recache: {BLUE}, 1.5s: {GREEN}"


@dataclasses.dataclass(frozen=True)
class Command:
  """`python -m module arguments`, under a name of its own."""

  name: str
  module: str
  arguments: tuple[str, ...]

  def of(self, tree: pathlib.Path) -> list:
    """As forks.py reads it."""
    arguments = [argument.replace("{tree}", str(tree)) for argument in self.arguments]
    return [self.name, self.module, arguments]


def command(name: str, module: str, **flags: Any) -> Command:
  """`--flag=value` for each."""
  arguments = tuple(f"--{flag}={value}" for flag, value in flags.items())
  return Command(name, f"hiar_jax.{module}", arguments)


def train(method: str, name: str = "train", config: str = "", **flags: Any) -> Command:
  overrides = {f"config.{key}": value for key, value in {**SMALL, **SETTINGS[method]}.items()}
  config = f"{EXPERIMENTS}/{config or CONFIGS[method]}:smoke"
  return command(name, "train", config=config, **{"workdir": "run", **flags}, **overrides)


def generated() -> list[Command]:
  """By texts of a file; from a picture; going on with a video; by the causal init."""
  make = lambda name, **flags: command(name, "generate", workdir="run", **flags)
  before = "text/a-red-circle-moving-left.mp4"
  return [
    make("text", prompts="prompts.txt", frames=8, seed=5, out="text"),
    make("picture", prompt=RED, image="start.png", frames=9, seed=1, out="picture.mp4"),
    make("continued", prompt=BLUE, video=before, frames=14, out="continued.mp4"),
    make("init", prompt=GREEN, stage="causal_init", out="init.mp4"),
  ]


def streamed() -> list[Command]:
  """Prompts that change, with and without showing the past anew; a carried sink; a picture start;
  one that is saved and gone on with.

  Into pictures, which lose nothing; what is saved at the end holds the latents under way, as
  floats.
  """
  run = lambda name: {"workdir": "run", "save": f"{name}_saved"}
  make = lambda name, **flags: command(name, "stream", **run(name), **flags)
  return [
    make("day", timeline=DAY, frames=24, seed=5, out="day"),
    make("carried", prompt=RED, sink=2, window=6, sink_place="carried", frames=20, out="carried"),
    make("shown", prompt=RED, image="start.png", frames=9, out="shown"),
    make("part", prompt=BLUE, frames=8, out="part.mp4"),
    make("resumed", resume="part_saved", frames=16, out="part.mp4"),
  ]


def commands_of_wan() -> list[Command]:
  """Published weights in and out; training, videos and a stream with Wan's codec and texts."""
  convert = lambda name, **flags: command(name, "convert", **flags)
  weights = {"config": "config.py", "weights": "weights"}
  make = lambda name, **flags: command(name, "generate", **weights, prompt="waves", **flags)
  tiled = {"height": 32, "width": 64, "tile": 4, "dtype": "bfloat16"}
  return [
    convert("convert", source="original", out="converted"),
    convert("convert_diffusers", source="diffusers", out="converted_diffusers"),
    convert("export", export="converted", layout="diffusers", out="exported", max_shard="100KB"),
    command("train", "train", config="config.py", workdir="run"),
    convert("export_run", export="run", layout="original", out="exported_run"),
    command("text", "generate", **weights, prompts="prompts.txt", seed=4, out="text"),
    make("picture", image="start.png", out="picture.mp4"),
    make("continued", video="text/waves.mp4", frames=40, out="continued.mp4"),
    make("tiled", frames=9, **tiled, out="tiled.mp4"),
    make("tiny", decoder="tiny_vae", out="tiny.mp4"),
    command("stream", "stream", **weights, prompt="waves", frames=45, out="stream", save="saved"),
  ]


def parts() -> dict[str, list[Command]]:
  """Self-Forcing finishes block after block: there is no pipe of them to stream."""
  own = {"workdir": "borrowed", "config.stages_from": "run"}
  borrowed = train("hiar", "borrowed", "shapes_no_forward_kl.py", **own)
  compared = command("compare", "compare", workdirs="run", videos=4, out="compared")
  return {
    "hiar": [train("hiar"), *generated(), *streamed(), borrowed, compared],
    "self_forcing": [train("self_forcing"), *generated()],
    "self_aligned": [train("self_aligned"), *generated(), *streamed()],
    "wan": commands_of_wan(),
  }


# --------------------------------------------------------------------------- what they start from


def write_inputs(
  part: str, folder: pathlib.Path, run_python: Callable[[str, pathlib.Path], None]
) -> None:
  """Makes `folder` with the files that a part's commands read.

  run_python(code, directory): runs the code there, with the revision's modules and its tests'.
  """
  folder.mkdir(parents=True)
  pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(folder / "start.png")
  if part == "wan":
    (folder / "config.py").write_text(WAN_CONFIG)
    prompts = ("waves", "A cat walks on the grass", "一只狗在海滩上奔跑", "snow falls")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    run_python(WAN_WEIGHTS, folder)
  else:
    (folder / "prompts.txt").write_text(f"{RED}\n{BLUE}\n{RED}\n")


WAN_CONFIG = """
from experiments import hiar_wan_1_3b

def get_config():
  c = hiar_wan_1_3b.get_config()
  c.data.size, c.data.frames, c.data.prompts = (16, 32), 21, "prompts.txt"
  c.weights.base = c.codec.weights = c.text.weights = "weights"
  c.weights.teacher = "teacher"
  c.model.update(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, dtype="float32")
  c.teacher_model.update(dim=48, ffn_dim=32, num_heads=2, num_layers=3, freq_dim=16)
  c.teacher_model.dtype = "float32"
  c.text.dim, c.text.length, c.text.dtype = 16, 64, "float32"
  c.history.window = 6
  c.trajectories.update(count=4, batch=2, steps=4)
  c.causal_init.update(steps=2, batch=2, ema_start=0)
  c.distill.update(steps=2, batch=2, critic_updates=1, ema_start=0)
  c.sample.update(count=2, length=2.0)
  c.log.update(every=1, checkpoint_every=1)
  c.mesh.update(data=1, fsdp=-1)
  return c
"""

WAN_WEIGHTS = """
import pathlib
from hiar_jax import weights
from hiar_jax.models import dit
import published_files
from test_generate_wan import random_like, save_weights
from test_train_wan import TEACHER

save_weights(pathlib.Path("weights"))
weights.save(pathlib.Path("teacher"), "dit", TEACHER, random_like(TEACHER, dit.init, 5, 0.2))
published_files.original_folder(pathlib.Path("original"))
published_files.diffusers_folder(pathlib.Path("diffusers"), shards=2)
"""
