"""Wan of a few thousand random numbers: a config, weights in a directory, commands with them."""

import functools
import pathlib

import jax
import numpy as np
from PIL import Image

from hiar_jax.checkpoints import weights
from hiar_jax.models import dit, taehv, umt5, vae
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_run
from tests.helpers.small_tokenizer import save_small_tokenizer

CONFIG = """
from hiar_jax.experiments import hiar_wan_1_3b

def get_config():
  c = hiar_wan_1_3b.get_config()
  c.data.size, c.data.frames = (16, 32), 21
  c.model.update(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, dtype="float32")
  c.text.dim, c.text.length, c.text.dtype = 16, 512, "float32"
  c.history.window = 6
  c.student.timesteps = (1000, 500)
  return c
"""


DIT = dit.DiTConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=16)


VAE = vae.VAEConfig(dim=4, num_res_blocks=1, dim_mult=(1, 1, 1, 1))


TINY_VAE = taehv.TinyVAEConfig(encoder_width=4, decoder_widths=(8, 4, 4, 4), blocks=1)


UMT5 = umt5.UMT5Config(vocab=200, dim=16, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=1)


def random_like(config, init, seed, scale):
  shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  leaves, tree = jax.tree.flatten(shapes)
  draw = np.random.default_rng(seed)
  return tree.unflatten(
    [scale * draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  )


def save_weights(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  weights.save(folder, "dit", DIT, random_like(DIT, dit.DiTConfig.init, seed, 0.2))
  weights.save(folder, "vae", VAE, jax.device_get(vae.init(VAE, jax.random.key(1))))
  weights.save(
    folder, "tiny_vae", TINY_VAE, jax.device_get(taehv.init(TINY_VAE, jax.random.key(2)))
  )
  weights.save(folder, "umt5", UMT5, random_like(UMT5, umt5.init, 3, 0.3))
  save_small_tokenizer(folder / "tokenizer")
  return folder


@functools.cache
def directory(parent: pathlib.Path) -> pathlib.Path:
  """Makes parent/tiny_wan with config.py, weights/, cat.png and before.mp4.

  It is one for all test modules of a session (parent: tmp_path_factory.getbasetemp()).
  """
  root = parent / "tiny_wan"
  root.mkdir()
  (root / "config.py").write_text(CONFIG)
  save_weights(root / "weights")
  pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(root / "cat.png")
  ramp = np.broadcast_to(
    np.linspace(0, 255, 24).astype(np.uint8)[:, None, None, None], (24, 16, 32, 3)
  )
  write_mp4(root / "before.mp4", ramp, 16)
  return root


def generate(
  parent: pathlib.Path, cases: dict[str, list[str]], common: list[str], devices: int = 1
) -> dict[str, tuple[int, str, str]]:
  """Runs hiar_jax.generate once a case; returns (exit status, stdout, stderr) by case."""
  done = tiny_run.chain(parent).commands(
    [("hiar_jax.generate", [*common, *case]) for case in cases.values()], devices=devices
  )
  return dict(zip(cases, done, strict=True))
