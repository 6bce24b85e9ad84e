"""Published weights as they lie on a disk: which models are in a source, under whose names, and of
what sizes.

A source is a folder in Wan2.1's original layout or in diffusers', a folder or index of one model's
shards, or a single file. The sizes follow from the tensors' shapes; what shapes cannot tell (heads,
epsilon, the statistics of latents) from a config.json beside them.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from hiar_jax.checkpoints import tensor_files
from hiar_jax.checkpoints.tensor_files import TensorSet
from hiar_jax.conversion import infer_config
from hiar_jax.conversion.dit_keys import dit_rules
from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.conversion.taehv_keys import tiny_vae_rules
from hiar_jax.conversion.umt5_keys import umt5_rules
from hiar_jax.conversion.vae_keys import vae_rules
from hiar_jax.errors import UserError

# kind -> (folder in diffusers' layout, start of the file names in the original one).
PLACES = {
  "dit": ("transformer", "diffusion_pytorch_model"),
  "vae": ("vae", "Wan2.1_VAE"),
  "umt5": ("text_encoder", "models_t5_umt5-xxl-enc"),
  "tiny_vae": (None, "taew2_1"),
}
TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json")
# A tensor that nothing else has -> (kind, layout).
MARKS = {
  "head.modulation": ("dit", "original"),
  "condition_embedder.time_proj.weight": ("dit", "diffusers"),
  "encoder.conv1.weight": ("vae", "original"),
  "encoder.conv_in.weight": ("vae", "diffusers"),
  "token_embedding.weight": ("umt5", "original"),
  "encoder.final_layer_norm.weight": ("umt5", "diffusers"),
  "encoder.2.conv.weight": ("tiny_vae", "original"),
}
# What config.json calls its model: kind -> (field, values).
CLASSES = {
  "dit": ("_class_name", ("WanModel", "CausalWanModel", "WanTransformer3DModel")),
  "vae": ("_class_name", ("AutoencoderKLWan",)),
  "umt5": ("model_type", ("umt5",)),
}


@dataclasses.dataclass(frozen=True)
class Model:
  """One model of a source."""

  kind: str
  layout: str
  config: Any
  tensors: TensorSet

  @property
  def rules(self) -> list[TensorMapping]:
    return rules_of(self.kind, self.config, self.layout)

  @property
  def source(self) -> str:
    return ", ".join(path.name for path in self.tensors.files)


def rules_of(kind: str, config: Any, layout: str) -> list[TensorMapping]:
  """The published tensors of a model. The tiny autoencoder has names of one kind only."""
  if kind == "tiny_vae":
    return tiny_vae_rules(config)
  rules: Callable[..., list[TensorMapping]] = {
    "dit": dit_rules,
    "vae": vae_rules,
    "umt5": umt5_rules,
  }[kind]
  return rules(config, layout)


def find(source: pathlib.Path) -> list[tuple[str | None, pathlib.Path]]:
  """Where the models of a source are: (kind, path), kind None where the tensors must tell. Nothing
  is opened.

  Raises UserError where there is no such source, or nothing in it.
  """
  if not source.exists():
    raise UserError(
      f"--source={source}: there is no such file or folder; download it, or check the path"
    )
  if source.is_file():
    return [(None, source)]
  folders = [
    (kind, source / folder)
    for kind, (folder, _) in PLACES.items()
    if folder and (source / folder).is_dir()
  ]
  if folders:
    return folders
  stems = [
    (kind, tensor_files.only_set(source, stem))
    for kind, (_, stem) in PLACES.items()
    if any(_weights(source, stem))
  ]
  whole = [place for place in stems if place[0] != "dit"]
  # A folder of one model in diffusers' layout has files of the same name as the original DiT's: the
  # tensors tell which it is.
  return stems if whole else [(None, tensor_files.only_set(source))]


def _weights(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
  return [path for path in folder.glob(f"{stem}*") if path.suffix in tensor_files.SUFFIXES]


def find_tokenizer(source: pathlib.Path) -> pathlib.Path | None:
  """The tokenizer of a source that is a folder, if it has one."""
  return next((source / name for name in TOKENIZERS if (source / name).is_file()), None)


def open_model(
  path: pathlib.Path, kind: str | None = None, *, entry: str | None = None, heads: int | None = None
) -> Model:
  """A model, its tensors not yet read. heads: of a DiT, where neither its config.json nor Wan2.1's
  width of 128 is right.

  Raises UserError where the tensors are those of another kind, or of none that is known.
  """
  tensors = tensor_files.open_tensors(path, entry)
  found = [place for mark, place in MARKS.items() if mark in tensors.named]
  if not found and kind is None:
    names = ", ".join(sorted(tensors.named)[:3])
    raise UserError(
      f"{path}: its tensors ({names}, ...) are those of no model that is known here; expected "
      f"{_known()}"
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
  sizes = infer_config.infer(
    kind, layout, {name: tuple(array.shape) for name, array in tensors.named.items()}, str(path)
  )
  stated = infer_config.stated(kind, _stated(tensors.files[0].parent, kind), str(path))
  if kind == "dit" and heads is not None:
    stated["num_heads"] = heads
  return Model(kind, layout, infer_config.build(kind, {**sizes, **stated}, str(path)), tensors)


def _known() -> str:
  return "Wan2.1's DiT, VAE or UMT5 encoder, in the original or diffusers' names, or taew2_1"


def _stated(folder: pathlib.Path, kind: str) -> dict:
  """The config.json beside the tensors, if it is that of a model of this kind."""
  path = folder / "config.json"
  if kind not in CLASSES or not path.is_file():
    return {}
  try:
    config = json.loads(path.read_text())
    field, values = CLASSES[kind]
    return config if config.get(field) in values else {}
  except (ValueError, AttributeError) as error:
    raise UserError(f"{path} is damaged ({error}); download it again") from error


def _untied(named: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
  """Transformers ties two names to one table, and versions differ in which they save: here it is
  `shared.weight`.
  """
  ours, other = "shared.weight", "encoder.embed_tokens.weight"
  named = dict(named)
  if other in named:
    table = named.pop(other)
    if not _same(named.setdefault(ours, table), table):
      raise UserError(
        f"{path}: {ours} and {other} differ; they must be one table, since the encoder has one. "
        "Use UMT5's own weights."
      )
  return named


def _same(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
  """Equality without a copy as large as the arrays."""
  if a is b or a.shape != b.shape or a.dtype != b.dtype:
    return a is b
  return all(a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows))


def missing(kinds: Sequence[str]) -> list[str]:
  """What a source of several models has not: the parts that generating a video needs."""
  return [kind for kind in ("dit", "vae", "umt5") if kind not in kinds]
