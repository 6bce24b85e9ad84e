"""What generate cannot do with a config and converted weights of Wan's layout is one line."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.checkpoints import weights
from hiar_jax.models import dit
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import published_files, tiny_wan, torch_archive
from tests.helpers.tiny_wan import DIT, random_like


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tiny_wan.directory(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def refused(place, tmp_path_factory):
  out = tmp_path_factory.mktemp("refused")
  larger = dataclasses.replace(DIT, num_layers=3)
  weights.save(out / "larger", "dit", larger, random_like(larger, dit.DiTConfig.init, 0, 0.1))
  published_files.diffusers_folder(out / "Tiny-Diffusers")
  torch_archive.save(published_files.tensors("dit"), out / "self forcing.pt")
  (out / "text.txt").write_text("no picture")
  (out / "prompts.txt").write_text("a\nimage=nowhere.png | b\n")
  write_mp4(out / "short.mp4", np.zeros((8, 16, 32, 3), np.uint8), 16)
  config, there, prompt = f"--config={place}/config.py", f"--weights={place}/weights", "--prompt=a"
  cases = {
    "no weights": [config, prompt],
    "missing weights": [config, f"--weights={out}/nowhere", prompt],
    "a download": [config, f"--weights={out}/Tiny-Diffusers", prompt],
    "a file": [config, f"--weights={out}/self forcing.pt", prompt],
    "a missing file": [config, f"--weights={out}/nowhere.safetensors", prompt],
    "another model": [
      config,
      f"--weights={out}/larger",
      prompt,
      f"--config.codec.weights={place}/weights",
      f"--config.text.weights={place}/weights",
    ],
    "both sources": [config, there, "--workdir=runs/x", prompt],
    "weights of a run": ["--workdir=runs/x", there, prompt],
    "a small world": ["--config=experiments/shapes.py", there, prompt],
    "no prompt": [config, there],
    "no UTF-8": [config, f"--weights={out}/nowhere", "--prompt=\udcff\udcfe"],
    "both starts": [
      config,
      there,
      prompt,
      f"--image={place}/cat.png",
      f"--video={place}/before.mp4",
    ],
    "odd size": [config, there, prompt, "--height=20", "--width=32"],
    "strict": [config, there, prompt, "--frames=20", "--strict"],
    "too few": [config, there, prompt, f"--video={place}/before.mp4", "--frames=21"],
    "no picture": [config, there, prompt, f"--image={out}/text.txt"],
    "missing picture": [config, there, prompt, f"--image={out}/nowhere.png"],
    "short": [config, there, prompt, f"--video={out}/short.mp4"],
    "in a file": [config, there, f"--prompts={out}/prompts.txt"],
    "tiny tiles": [config, there, prompt, "--decoder=tiny_vae", "--tile=8"],
    "small tiles": [config, there, prompt, "--tile=2"],
    "a dtype": [config, there, prompt, "--dtype=float16"],
    "a decoder": [config, there, prompt, "--decoder=wan"],
  }
  return tiny_wan.generate(place.parent, cases, [f"--out={out}/x.mp4"]), out


REFUSED = {
  "no weights": "--weights is missing; give a directory of converted weights",
  "missing weights": "hiar_jax.convert",
  "a download": "Tiny-Diffusers is published weights, not converted ones; python -m "
  "hiar_jax.convert --source={out}/Tiny-Diffusers --out=weights/Tiny-Diffusers makes these, then "
  "give weights/Tiny-Diffusers",
  "a file": "self forcing.pt is published weights, not converted ones; python -m hiar_jax.convert "
  "--source='{out}/self forcing.pt' --out='weights/self forcing' makes these",
  "a missing file": "nowhere.safetensors is not there; expected a directory of converted weights; "
  "convert published weights with python -m hiar_jax.convert --source=FILES --out=weights/nowhere",
  "another model": "holds another model than the config describes: num_layers 3, not 2",
  "both sources": "give either --workdir, a trained run, or --config with --weights",
  "weights of a run": "--weights needs --config",
  "a small world": "codec.kind = 'patches' is fitted by a run: give --workdir",
  "no prompt": "give either --prompt=",
  "no UTF-8": r"prompt = '\udcff\udcfe' holds half a character, or a byte that is not UTF-8",
  "both starts": "give either --image or --video",
  "odd size": "--height=20: the sides of a video are multiples of 16; the nearest size is 16x32",
  "strict": "frames = 20 is not whole blocks of 3 latent frames; the nearest counts are 9 and 21",
  "too few": "frames = 21, but the given start has 21 already; ask for more, from 33 on",
  "no picture": "text.txt is not an image",
  "missing picture": "image /",
  "short": "short.mp4 has 8 frames at 16 a second, a start needs whole blocks, at least 9 frames",
  "in a file": "line 2: image = 'nowhere.png': there is no file",
  "tiny tiles": "--tile=8: the tiny autoencoder decodes whole frames",
  "small tiles": "--tile=2: expected at least 4 latents a side (32 pixels), or 0 for whole frames",
  "a dtype": "--dtype=float16: value should be one of <float32|bfloat16>",
  "a decoder": "--decoder=wan: value should be one of <vae|tiny_vae>",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_line(refused, name):
  results, out = refused
  status, printed, err = results[name]
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert status == 2 and printed == "" and len(lines) == 1 and "Traceback" not in err, err
  assert REFUSED[name].replace("{out}", str(out)) in lines[0], err
  assert not (out / "x.mp4").exists() and not [*out.rglob("*.tmp")]
