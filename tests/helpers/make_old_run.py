"""Makes golden_runs/ anew, from the code as it is, for a commit whose files must be read later:

  python -m tests.helpers.make_old_run

in the root of a checkout. It works below DIRECTORY, since Orbax writes absolute paths into files.
"""

import argparse
import json
import pathlib
import pprint
import runpy
import shutil
import signal
import tarfile
import tempfile

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from hiar_jax.conversion import catalog
from hiar_jax.models import dit, taehv, umt5, vae
from tests.helpers import old_run, published_files, tiny_run
from tests.helpers.small_tokenizer import save_small_tokenizer

DIRECTORY = "/var/tmp/old_run"

SHAPES = {
  "data.clips": 12,
  "data.size": 16,
  "data.frames": 4,
  "history.block": 2,
  "history.window": 4,
  "codec.channels": 8,
  "text.dim": 8,
  "text.length": 12,
  "model.dim": 8,
  "model.ffn_dim": 12,
  "model.num_layers": 2,
  "model.num_heads": 1,
  "model.freq_dim": 8,
  # Rates so high that no part of the network stays near zero, where nobody would miss it.
  "teacher.steps": 4,
  "teacher.batch": 4,
  "teacher.warmup": 0,
  "teacher.ema_decay": 0.1,
  "teacher.lr": 0.2,
  "teacher.muon_lr": 0.1,
  "trajectories.count": 6,
  "trajectories.batch": 6,
  "trajectories.steps": 4,
  "causal_init.steps": 4,
  "causal_init.batch": 4,
  "causal_init.warmup": 0,
  "causal_init.ema_decay": 0.1,
  "causal_init.lr": 0.2,
  "causal_init.muon_lr": 0.1,
  "distill.steps": 6,
  "distill.batch": 4,
  "distill.critic_updates": 2,
  "distill.rule": "muon",
  "distill.warmup": 1,
  "distill.ema_start": 1,
  "distill.lr": 1e-2,
  "distill.critic_lr": 1e-2,
  "sample.count": 2,
  "sample.measure": 2,
  "sample.batch": 2,
  "sample.length": 2.0,
  "log.every": 1,
  "log.checkpoint_every": 4,
  "log.preview_every": 100,
}
STOP = 4 + 4 + 4  # updates of teacher, causal init and distillation
WAN = {
  "data.size": (16, 32),
  "data.frames": 21,
  "history.window": 6,
  "student.timesteps": (1000, 500),
  "sample.scale": old_run.SCALE,
  "trajectories.steps": 4,
  "model.dim": 24,
  "model.ffn_dim": 24,
  "model.num_heads": 2,
  "model.num_layers": 2,
  "model.freq_dim": 16,
  "model.dtype": "float32",
  "text.dim": 12,
  "text.length": 64,
  "text.dtype": "float32",
}
NETWORKS = {
  "dit": dit.DiTConfig(
    dim=24, ffn_dim=24, num_heads=2, num_layers=2, channels=16, text_dim=12, freq_dim=16
  ),
  "vae": vae.VAEConfig(dim=2, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
  "umt5": umt5.UMT5Config(vocab=200, dim=12, dim_attn=12, dim_ffn=16, num_heads=2, num_layers=1),
  "tiny_vae": taehv.TinyVAEConfig(encoder_width=4, decoder_widths=(8, 4, 4, 4), blocks=1),
}
FILES = {
  "dit": "diffusion_pytorch_model",
  "vae": "Wan2.1_VAE",
  "umt5": "models_t5_umt5-xxl-enc-bf16",
  "tiny_vae": "taew2_1",
}
# Such that frames are neither flat nor clipped.
GAIN = {"dit": 1.5, "vae": 1.5, "umt5": 1.5, "tiny_vae": 0.8}

FROZEN = '''"""{experiment}, made tiny.

Every field is written out, so that it does not follow what the experiment becomes later.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict(CONFIG)


CONFIG = {config}
'''


def write_config(path: pathlib.Path, experiment: str, variant: list[str], changes: dict) -> None:
  """A config file that imports no experiment."""
  config = runpy.run_path(str(tiny_run.ROOT / experiment))["get_config"](*variant)
  config.update_from_flattened_dict(changes)
  path.parent.mkdir(parents=True)
  text = pprint.pformat(config.to_dict(), width=100, sort_dicts=False)
  name = ":".join((experiment, *variant))
  path.write_text(FROZEN.format(experiment=name, config=text))


def run(chain: tiny_run.Chain, *commands: list[str]) -> None:
  for status, _, err in chain.commands([(module, words) for module, *words in commands]):
    assert status == 0, err


def make_shapes(chain: tiny_run.Chain, place: pathlib.Path) -> None:
  """A run that was stopped in the middle of distillation, a video and a stream of it."""
  shapes = place / "shapes"
  write_config(shapes / "config.py", "experiments/shapes.py", ["smoke"], SHAPES)
  command = old_run.train(place)[1:]
  stopped = chain.python("-c", tiny_run.VICTIM, f"step::{STOP}", *command)
  assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
  for path in (shapes / "run" / "logs").glob("events.out.*"):
    path.unlink()  # their names hold the machine's
  stream = [
    "hiar_jax.stream",
    f"--workdir={shapes}/run",
    "--seed=5",
    f"--timeline=0s: {old_run.SHOWN}, 1s: {old_run.CHANGED}",
    f"--frames={old_run.TAKEN['shapes']}",
    f"--out={shapes}/stream.mp4",
    f"--save={shapes}/saved",
  ]
  run(chain, old_run.make_clip(place), stream)


def tempered(name: str, array: np.ndarray, gain: float) -> np.ndarray:
  """Standard normal numbers as weights that keep activations in bounds.

  They are multiples of 1/64: few digits compress well.
  """
  fan_in = array[0].size
  layer = name.split(".")[-2] if "." in name else ""
  if name.endswith(".gamma") or (layer.startswith("norm") and name.endswith(".weight")):
    array = 1 + array / 8
  else:
    array = array * (1 / 8 if fan_in == 1 else gain / np.sqrt(fan_in))
  return (np.rint(array * 64) / 64).astype(np.float32)


def make_wan(chain: tiny_run.Chain, place: pathlib.Path) -> None:
  """A weights directory, converted from files of the published layout, and a stream of it."""
  there, source = place / "wan", place / "source"
  write_config(there / "config.py", "experiments/hiar_wan_1_3b.py", [], WAN)
  source.mkdir()
  for kind, config in NETWORKS.items():
    normal = published_files.tensors(kind, config=config)
    named = {name: tempered(name, array, GAIN[kind]) for name, array in normal.items()}
    save_file(named, source / f"{FILES[kind]}.safetensors")
  described = catalog.model_config("dit", NETWORKS["dit"], "original")
  (source / "config.json").write_text(json.dumps(described))
  save_small_tokenizer(source / "google" / "umt5-xxl")
  pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(there / "start.png")
  stream = [
    *old_run.wan(place, "stream"),
    f"--prompt={old_run.CACHED}",
    "--seed=5",
    f"--frames={old_run.TAKEN['wan']}",
    f"--out={there}/pictures",
    f"--save={there}/saved",
  ]
  run(chain, ["hiar_jax.convert", f"--source={source}", f"--out={there}/weights"], stream)


def pack(place: pathlib.Path) -> None:
  """Writes the archive, which says nothing of who packed it."""

  def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid, info.gid, info.uname, info.gname, info.mtime = 0, 0, "", "", 0
    info.mode = 0o755 if info.isdir() else 0o644
    return info

  old_run.FOLDER.mkdir(exist_ok=True)
  with tarfile.open(old_run.ARCHIVE, "w:xz", preset=9) as archive:
    for name in ("shapes", "wan"):
      archive.add(place / name, name, filter=anonymous)


def record(chain: tiny_run.Chain) -> None:
  """Writes down what this code makes of the archive, elsewhere."""
  with tempfile.TemporaryDirectory() as elsewhere:
    training, using = (old_run.unpack(pathlib.Path(elsewhere) / name) for name in ("a", "b"))
    for name, (status, _, err) in old_run.work(chain, training, using).items():
      assert status == 0, f"{name}: {err}"
    place = lambda command: training if command == "train" else using
    old_run.record({name: read(place(name)) for name, read in old_run.RESULTS.items()})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--directory", default=DIRECTORY, help="to work in; it may not be there yet")
  place = pathlib.Path(parser.parse_args().directory)
  place.mkdir()
  chain = tiny_run.Chain(place)
  make_shapes(chain, place)
  make_wan(chain, place)
  pack(place)
  record(chain)
  shutil.rmtree(place)
  print(sum(path.stat().st_size for path in old_run.FOLDER.iterdir()), "bytes in", old_run.FOLDER)


if __name__ == "__main__":
  main()
