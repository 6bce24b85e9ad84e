"""Detection of the models in published weights: their kinds, naming layouts and configs.

A source is a folder in Wan2.1's original layout or in diffusers', a folder or index of one model's
shards, or a single file. Sizes follow from the tensors' shapes; what shapes do not determine
(heads, epsilon, the statistics of latents) is read from a config.json beside them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from hiar_jax.checkpoints import tensor_files
from hiar_jax.checkpoints.tensor_files import TensorSet
from hiar_jax.conversion import infer_config
from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.conversion.vae_keys import vae_key_map
from hiar_jax.errors import UserError

# kind -> (folder in diffusers' layout, start of the file names in the original one).
FOLDERS_AND_STEMS = {
  "dit": ("transformer", "diffusion_pytorch_model"),
  "vae": ("vae", "Wan2.1_VAE"),
  "umt5": ("text_encoder", "models_t5_umt5-xxl-enc"),
  "tiny_vae": (None, "taew2_1"),
}
TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
# A tensor that only one kind and layout has -> (kind, layout).
MARKER_TENSORS = {
  "head.modulation": ("dit", "original"),
  "condition_embedder.time_proj.weight": ("dit", "diffusers"),
  "encoder.conv1.weight": ("vae", "original"),
  "encoder.conv_in.weight": ("vae", "diffusers"),
  "token_embedding.weight": ("umt5", "original"),
  "encoder.final_layer_norm.weight": ("umt5", "diffusers"),
  "encoder.2.conv.weight": ("tiny_vae", "original"),
}
# Class of the model in config.json: kind -> (field, values).
CLASSES = {
  "dit": (
    "_class_name",
    ("WanModel", "CausalWanModel", "WanTransformer3DModel", "HeliosTransformer3DModel"),
  ),
  "vae": ("_class_name", ("AutoencoderKLWan",)),
  "umt5": ("model_type", ("umt5",)),
}
# Folders of the two DiTs of Wan2.2-A14B, for noisy and for nearly clean latents, in both layouts.
EXPERTS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
# Wan2.2's autoencoder, which is not supported: found so that it is said.
NEWER_VAE = "Wan2.2_VAE"
# Last parts of the names of tensors that only scaled (quantised) weights have, as ComfyUI's.
SCALES = {"scaled_fp8", "scale_weight", "scale_input", "weight_scale", "input_scale", "comfy_quant"}
_ROWS = 4096  # of two tables, compared at once


@dataclasses.dataclass(frozen=True)
class Model:
  """One model of a source; layout is "original" or "diffusers"."""

  kind: str
  layout: str
  config: Any
  tensors: TensorSet


def key_map(kind: str, config: Any, layout: str) -> list[TensorMapping]:
  """Returns the key map of a model: one rule per published tensor."""
  if kind == "tiny_vae":  # published under one set of names only
    return tiny_vae_key_map(config)
  make: Callable[..., list[TensorMapping]] = {
    "dit": dit_key_map,
    "vae": vae_key_map,
    "umt5": umt5_key_map,
  }[kind]
  return make(config, layout)


def find_models(source: pathlib.Path) -> list[tuple[str | None, pathlib.Path]]:
  """Finds the models of a source: (kind, path), kind None if only the tensors can tell.

  Reads no more than names of tensors. Raises UserError if the source does not exist or holds no
  weights.
  """
  if not os.path.exists(source):  # a Path raises for names that no file has
    raise UserError(
      f"--source={source}: there is no such file or folder; download it, or check the path"
    )
  if source.is_file():
    together = []
    if source.suffix == ".safetensors":
      together = tensor_files.kinds_together(tensor_files.open_safetensors(source))
    return [(kind, source) for kind in together or (None,)]
  folders = [
    (kind, source / folder)
    for kind, (folder, _) in FOLDERS_AND_STEMS.items()
    if folder and (source / folder).is_dir()
  ]
  if folders:
    return folders
  stems = [
    (kind, tensor_files.only_set(source, stem))
    for kind, (_, stem) in FOLDERS_AND_STEMS.items()
    if any(path.suffix in tensor_files.SUFFIXES for path in source.glob(f"{stem}*"))
  ]
  stems += [("vae", path) for path in sorted(source.glob(f"{NEWER_VAE}.*"))[:1]]
  # Files of the DiT's stem alone are ambiguous: in diffusers' layout, the folder of any one model
  # has files of that name. The tensors decide.
  if all(kind == "dit" for kind, _ in stems):
    return [(None, tensor_files.only_set(source))]
  return stems


def check_experts(source: pathlib.Path) -> None:
  """Raises UserError for a source with two DiTs, of which one would be left out without a word."""
  for both in EXPERTS:
    if all((source / name).is_dir() for name in both):
      raise UserError(
        f"--source={source} has two DiTs, {both[0]}/ and {both[1]}/ (Wan2.2-A14B), and one alone "
        f"is supported; give its folder, as --source={source / both[0]}, and the other parts with "
        "--kind"
      )


def open_model(
  path: pathlib.Path, kind: str | None = None, *, entry: str | None = None, heads: int | None = None
) -> Model:
  """Opens a model without reading its tensors' numbers.

  heads: of a DiT, if neither its config.json nor Wan2.1's head width of 128 is right. Raises
  UserError if the tensors are those of another kind, or of no known one.
  """
  tensors = tensor_files.open_tensors(path, entry, kind)
  _check_not_scaled(tensors.named, path)
  found = [model for marker, model in MARKER_TENSORS.items() if marker in tensors.named]
  if not found and kind is None:
    names = ", ".join(sorted(tensors.named)[:3])
    raise UserError(
      f"{path}: its tensors ({names}, ...) are those of no model that is known here; expected "
      "Wan2.1's DiT, VAE or UMT5 encoder, in the original or diffusers' names, or taew2_1"
    )
  if not found or (kind is not None and found[0][0] != kind):
    there = f"those of kind {found[0][0]!r}" if found else "not"
    raise UserError(
      f"{path}: expected the tensors of kind {kind!r}, but they are {there}; check --kind and the "
      "path"
    )
  kind, layout = found[0]
  if (kind, layout) == ("umt5", "diffusers"):
    tensors = dataclasses.replace(tensors, named=_untied(tensors.named, path))
  shapes = {name: tuple(array.shape) for name, array in tensors.named.items()}
  sizes = infer_config.infer(kind, layout, shapes, str(path))
  beside = _stated(tensors.files[0].parent, kind)
  stated = infer_config.stated(kind, beside, str(path), len(shapes))
  if kind == "dit" and heads is not None:
    stated["num_heads"] = heads
  # Stated fields win: where they contradict the shapes, checking the tensors names the difference.
  return Model(kind, layout, infer_config.build(kind, {**sizes, **stated}, str(path)), tensors)


def _check_not_scaled(names: Iterable[str], path: pathlib.Path) -> None:
  """Raises UserError for quantised weights, whose numbers mean nothing without their scales."""
  scales = sorted(name for name in names if name.rpartition(".")[2] in SCALES)
  if scales:
    raise UserError(
      f"{path}: fp8-scaled weights ({len(scales)} tensors of scales, as {scales[0]}), which are "
      "not read; give the same weights in bfloat16, float16 or float32"
    )


def _stated(folder: pathlib.Path, kind: str) -> dict:
  """Reads the config.json beside the tensors; empty if absent or of another kind of model."""
  path = folder / "config.json"
  if kind not in CLASSES or not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text())
    field, values = CLASSES[kind]
    return config if config.get(field) in values else {}
  except (ValueError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({error}); download it again") from error


def _untied(named: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
  """Renames UMT5's embedding table to `shared.weight`; raises UserError if there are two tables.

  Transformers ties two names to one table, and its versions differ in which of them they save.
  """
  ours, other = "shared.weight", "encoder.embed_tokens.weight"
  named = dict(named)
  if other in named:
    a = named.pop(other)
    b = named.setdefault(ours, a)
    # Bytes rather than numbers, so that NaN equals NaN; in pieces, since a table may have 4 GB.
    same = a is b or (
      (a.shape, a.dtype) == (b.shape, b.dtype)
      and all(
        a[row : row + _ROWS].tobytes() == b[row : row + _ROWS].tobytes()
        for row in range(0, len(a), _ROWS)
      )
    )
    if not same:
      raise UserError(
        f"{path}: {ours} and {other} differ; they must be one table, since the encoder has one. "
        "Use UMT5's own weights."
      )
  return named


def missing(kinds: Sequence[str]) -> list[str]:
  """Returns the kinds that generating a video needs and that are not among `kinds`."""
  return [kind for kind in ("dit", "vae", "umt5") if kind not in kinds]
