"""docs/wan.md tells the truth: every command of it, in its order, in a directory with small random
weights of the published layout.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from hiar_jax.checkpoints import weights
from hiar_jax.conversion import catalog
from hiar_jax.models import dit, umt5, vae
from tests.helpers import published_files, tiny_run, torch_archive
from tests.helpers.small_tokenizer import save_small_tokenizer
from tests.helpers.tiny_wan import DIT, UMT5, VAE
from tests.helpers.video_reader import read_mp4

PAGE = tiny_run.ROOT / "docs" / "wan.md"
SMALL = f'''
import runpy

def get_config():
  c = runpy.run_path("{tiny_run.ROOT}/experiments/hiar_wan_1_3b.py")["get_config"]()
  c.data.size, c.data.frames = (16, 32), 21
  for model in (c.model, c.teacher_model):
    model.update(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16)
    model.update(dtype="float32", remat="none")
  c.text.dim, c.text.length, c.text.dtype = 16, 64, "float32"
  c.trajectories.update(count=2, batch=2, steps=4)
  c.causal_init.update(steps=1, batch=2, ema_start=0)
  c.distill.update(steps=1, batch=2, ema_start=0)
  c.mesh.update(data=1, fsdp=-1)
  c.sample.update(count=1, length=1.0)
  return c
'''


def commands() -> list[str]:
  blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
  return [
    line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()
  ]


def random_tensors(kind: str, config, init) -> dict[str, np.ndarray]:
  """Under the original names; small enough for a sensible forward."""
  params = jax.device_get(init(config, jax.random.key(0)))
  noisy = jax.tree.map(
    lambda x: np.asarray(x + 0.05 * np.random.default_rng(x.size).normal(size=x.shape), np.float32),
    params,
  )
  return published_files.to_published(
    noisy, published_files.KEY_MAPS[kind](config, "original"), kind
  )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
  """What a person has after the download, at a small size."""
  root = tmp_path_factory.mktemp("docs")
  source = root / "Wan2.1-T2V-1.3B"
  source.mkdir()
  network = random_tensors("dit", DIT, dit.DiTConfig.init)
  save_file(network, source / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
  (source / "config.json").write_text(json.dumps(catalog.model_config("dit", DIT, "original")))
  torch_archive.save(random_tensors("vae", VAE, vae.init), source / "Wan2.1_VAE.pth")
  torch_archive.save(
    random_tensors("umt5", UMT5, umt5.init), source / "models_t5_umt5-xxl-enc-bf16.pth"
  )
  save_small_tokenizer(source / "google" / "umt5-xxl")
  torch_archive.save(
    {"generator_ema": {f"model.{name}": array for name, array in network.items()}}, root / "hiar.pt"
  )
  weights.save(root / "weights" / "wan_14b", "dit", DIT, DIT.init(jax.random.key(1)))
  (root / "experiments").mkdir()
  (root / "experiments" / "hiar_wan_1_3b.py").write_text(SMALL)
  (root / "prompts.txt").write_text(
    "A cat walks on the grass\nseed=7 image=cat.png out=dog.mp4 | A dog runs along the beach\n"
  )
  Image.fromarray(np.full((40, 50, 3), 120, np.uint8)).save(root / "cat.png")
  (root / "ode_pairs").mkdir()
  for i in range(2):
    points = np.random.default_rng(i).normal(size=(1, 5, 6, 16, 2, 4)).astype(np.float32)
    torch_archive.save({f"prompt {i}": points}, root / "ode_pairs" / f"{i:05d}.pt")
  return root


@pytest.mark.slow
def test_every_command_of_the_page_runs(place):
  environment = tiny_run.environment()
  assert len(commands()) >= 10
  for command in commands():
    program, *arguments = shlex.split(command)
    assert program == "python", command
    if "--source=hiar.pt" in command:
      arguments += ["--heads=2"]  # 128 wide at full size
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=place,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
  assert weights.read_config(place / "weights" / "hiar", "dit").num_heads == 2
  for video, frames in (
    ("cat.mp4", 21),
    ("from_picture.mp4", 25),
    ("continued.mp4", 153),
    ("videos/dog.mp4", None),
  ):
    shown = read_mp4(place / video)[0]
    assert shown.shape[1:] == (16, 32, 3) and (frames is None or abs(len(shown) - frames) <= 12), (
      video,
      shown.shape,
    )
  assert (place / "hiar-diffusers" / "transformer" / "config.json").exists()
  assert list((place / "hiar-original").glob("*.safetensors"))


def test_the_page_names_files_and_modules_that_are_there():
  for name in re.findall(r"experiments/[\w]+\.py|tests/[\w]+\.py", PAGE.read_text()):
    assert (tiny_run.ROOT / name).exists(), name
  for module in re.findall(r"python -m (hiar_jax\.[\w.]+)", PAGE.read_text()):
    assert (tiny_run.ROOT / (module.replace(".", "/") + ".py")).exists(), module
