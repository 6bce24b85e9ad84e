"""Small random weights in the published layouts: what a download of Wan2.1 looks like, a few
thousand numbers each.
"""

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file
import tokenizers

from hiar_jax.conversion import catalog
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.models import dit, taehv, umt5, vae
from tests.helpers import tiny, torch_archive
from tests.helpers.published_params import from_published, to_published

# Two heads of 128, so that the sizes can be told from the shapes alone.
CONFIGS = {
  "dit": dit.DiTConfig(
    dim=256, ffn_dim=12, num_heads=2, num_layers=2, channels=4, text_dim=6, freq_dim=8
  ),
  "vae": vae.VAEConfig(dim=2, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
  "umt5": umt5.UMT5Config(
    vocab=20, dim=6, dim_attn=8, dim_ffn=10, num_heads=2, num_layers=2, num_buckets=8
  ),
  "tiny_vae": taehv.TinyVAEConfig(encoder_width=4, decoder_widths=(8, 6, 4, 4), blocks=2),
}
KEY_MAPS = {
  "dit": dit_key_map,
  "vae": vae_key_map,
  "umt5": umt5_key_map,
  "tiny_vae": lambda config, _: tiny_vae_key_map(config),
}


def tensors(
  kind: str, layout: str = "original", dtype=np.float32, config=None
) -> dict[str, np.ndarray]:
  """Random tensors under their published names; the numbers do not depend on the layout."""
  config = config or CONFIGS[kind]
  original = KEY_MAPS[kind](config, "original")
  named = {
    rule.name: tiny.random(zlib.crc32(rule.name.encode()), *rule.shape).astype(dtype)
    for rule in original
  }
  return to_published(from_published(named, original, kind), KEY_MAPS[kind](config, layout), kind)


def params(kind: str, dtype=np.float32):
  return from_published(tensors(kind, dtype=dtype), KEY_MAPS[kind](CONFIGS[kind], "original"), kind)


def save_shards(named: dict[str, np.ndarray], folder: pathlib.Path, stem: str, count: int) -> None:
  """Safetensors with an index, as the hub's tools cut them."""
  names = list(named)
  places = {
    name: f"{stem}-{1 + i * count // len(names):05d}-of-{count:05d}.safetensors"
    for i, name in enumerate(names)
  }
  for file in set(places.values()):
    save_file(
      {name: named[name] for name in names if places[name] == file},
      folder / file,
      metadata={"format": "pt"},
    )
  index = {
    "metadata": {"total_size": sum(array.nbytes for array in named.values())},
    "weight_map": places,
  }
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(path: pathlib.Path) -> None:
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], unk_id=2
    )
  )
  path.parent.mkdir(parents=True)
  tokenizer.save(str(path))


def original_folder(folder: pathlib.Path, shards: int = 1) -> pathlib.Path:
  """As Wan-AI/Wan2.1-T2V-1.3B, or with shards as the 14B."""
  folder.mkdir(parents=True)
  stem = "diffusion_pytorch_model"
  if shards > 1:
    save_shards(tensors("dit"), folder, stem, shards)
  else:
    save_file(tensors("dit"), folder / f"{stem}.safetensors", metadata={"format": "pt"})
  torch_archive.save(tensors("vae"), folder / "Wan2.1_VAE.pth")
  torch_archive.save(tensors("umt5", dtype="bfloat16"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
  config = catalog.model_config("dit", CONFIGS["dit"], "original")
  (folder / "config.json").write_text(json.dumps(config))
  save_tokenizer(folder / "google" / "umt5-xxl" / "tokenizer.json")
  return folder


def diffusers_folder(folder: pathlib.Path, shards: int = 1) -> pathlib.Path:
  """As Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the same numbers as in original_folder."""
  stems = {
    "dit": ("transformer", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "umt5": ("text_encoder", "model"),
  }
  for kind, (part, stem) in stems.items():
    (folder / part).mkdir(parents=True)
    named = tensors(kind, "diffusers", "bfloat16" if kind == "umt5" else np.float32)
    if shards > 1 and kind != "vae":
      save_shards(named, folder / part, stem, shards)
    else:
      save_file(named, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / part / "config.json").write_text(
      json.dumps(catalog.model_config(kind, CONFIGS[kind], "diffusers"))
    )
  save_tokenizer(folder / "tokenizer" / "tokenizer.json")
  return folder
