"""Key maps of the DiT: Wan2.1's original names and diffusers' (`transformer/`).

With packed frames, Helios's (diffusers' HeliosTransformer3DModel): diffusers' names of Wan2.1, a
projection for each of three kernels, and another name of the last modulation.
"""

import numpy as np

from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.errors import UserError
from hiar_jax.models.dit import DiTConfig
from hiar_jax.models.dit_packed import projection_of

LAYOUTS = ("original", "diffusers")
HELIOS = {1: "patch_short", 2: "patch_mid", 4: "patch_long"}  # pool -> name of its projection

# Linear layers outside of the blocks: original name, diffusers' name, path here. The tables below
# have the same columns.
_ENDS = (
  ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "text_embedding_in"),
  ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "text_embedding_out"),
  ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "time_embedding_in"),
  ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "time_embedding_out"),
  ("time_projection.1", "condition_embedder.time_proj", "time_projection"),
  ("head.head", "proj_out", "head"),
)
_ATTENTIONS = (("self_attn", "attn1", "self_attention"), ("cross_attn", "attn2", "text_attention"))
_PROJECTIONS = (("q", "to_q", "q"), ("k", "to_k", "k"), ("v", "to_v", "v"), ("o", "to_out.0", "o"))
_MLP = (("ffn.0", "ffn.net.0.proj", "mlp_in"), ("ffn.2", "ffn.net.2", "mlp_out"))


def dit_key_map(config: DiTConfig, layout: str = "original") -> list[TensorMapping]:
  """Returns one rule per published tensor, in the order of the network.

  Layers are stacked on a leading axis here. layout: "original" (Wan2.1's names) or "diffusers"
  (WanTransformer3DModel's; HeliosTransformer3DModel's where the config has packed frames). Raises
  UserError for another layout, or a config of which there are no published models.
  """
  if layout not in LAYOUTS:
    raise UserError(f"DiT: unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
  if config.place_embedding:
    raise UserError(
      "DiT: place_embedding = True: published models have none, so such weights have no published "
      "names."
    )
  if config.guided:
    raise UserError(
      "DiT: distilled guidance: none of the layouts has a place for its embedding, so such weights "
      "have no published names."
    )
  if config.packing and (layout != "diffusers" or set(config.packing) != set(HELIOS)):
    kernels = ", ".join(f"k{pool}" for pool in config.packing)
    raise UserError(
      f"DiT: packing by {kernels} has no published names in the layout {layout!r}; diffusers' has "
      "them for k1, k2 and k4"
    )
  d = config.dim
  column = LAYOUTS.index(layout)
  shapes = {  # [out, in], as PyTorch stores linear layers
    "text_embedding_in": (d, config.text_dim),
    "text_embedding_out": (d, d),
    "time_embedding_in": (d, config.freq_dim),
    "time_embedding_out": (d, d),
    "time_projection": (6 * d, d),  # shift, scale and gate of attention and of the MLP
    "head": (int(np.prod(config.patch)) * config.channels, d),
  }
  rules = []
  projections = [("patch_embedding", "patch_embedding", 1)]
  projections += [(HELIOS[pool], projection_of(pool), pool) for pool in config.packing]
  for name, ours, pool in projections:
    patch = (d, config.channels, *(pool * size for size in config.patch))
    rules.append(TensorMapping(f"{name}.weight", patch, (ours, "kernel"), "patches"))
    rules.append(TensorMapping(f"{name}.bias", (d,), (ours, "bias")))
  for *names, ours in _ENDS:
    rules += _linear(names[column], shapes[ours], (ours,))
  for layer in range(config.num_layers):
    rules += _layer_key_map(config, layer, column)
  head_modulation = ("head.modulation", "scale_shift_table")[column]
  if config.packing:
    head_modulation = f"norm_out.{head_modulation}"
  return [*rules, TensorMapping(head_modulation, (1, 2, d), ("head_modulation",))]


def _layer_key_map(config: DiTConfig, layer: int, column: int) -> list[TensorMapping]:
  d = config.dim
  stem = f"blocks.{layer}"
  # The one norm with weights stands before the text attention: Wan2.1 calls it norm3, diffusers
  # norm2.
  modulation, norm = (("modulation", "norm3"), ("scale_shift_table", "norm2"))[column]
  rules = [
    TensorMapping(f"{stem}.{modulation}", (1, 6, d), ("layers", "modulation"), layer=layer),
    TensorMapping(f"{stem}.{norm}.weight", (d,), ("layers", "norm_text", "scale"), layer=layer),
    TensorMapping(f"{stem}.{norm}.bias", (d,), ("layers", "norm_text", "bias"), layer=layer),
  ]
  for *attention, ours in _ATTENTIONS:
    for *projection, p in _PROJECTIONS:
      name = f"{stem}.{attention[column]}.{projection[column]}"
      rules += _linear(name, (d, d), ("layers", ours, p), layer)
    for p in "qk":  # RMS norms over the whole width, not per head
      name = f"{stem}.{attention[column]}.norm_{p}.weight"
      path = ("layers", ours, f"norm_{p}", "scale")
      rules.append(TensorMapping(name, (d,), path, layer=layer))
  for *names, ours in _MLP:
    shape = (config.ffn_dim, d) if ours == "mlp_in" else (d, config.ffn_dim)
    rules += _linear(f"{stem}.{names[column]}", shape, ("layers", ours), layer)
  return rules


def _linear(
  name: str, shape: tuple[int, int], path: tuple[str, ...], layer: int | None = None
) -> list[TensorMapping]:
  return [
    TensorMapping(f"{name}.weight", shape, (*path, "kernel"), "linear", layer),
    TensorMapping(f"{name}.bias", shape[:1], (*path, "bias"), layer=layer),
  ]
