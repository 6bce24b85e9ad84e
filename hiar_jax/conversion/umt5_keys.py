"""Key maps of the UMT5 encoder: Wan2.1's names (`models_t5_*.pth`) and transformers'
(`text_encoder/`).
"""

from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.errors import UserError
from hiar_jax.models.umt5 import UMT5Config

LAYOUTS = ("original", "diffusers")


def umt5_key_map(config: UMT5Config, layout: str = "original") -> list[TensorMapping]:
  """Returns one rule per published tensor.

  layout: "original" (Wan2.1's names) or "diffusers" (transformers' UMT5EncoderModel). Transformers
  ties `encoder.embed_tokens.weight` to `shared.weight`; the rules have the latter alone. Raises
  UserError for another layout.
  """
  if layout not in LAYOUTS:
    raise UserError(f"UMT5: unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
  column = LAYOUTS.index(layout)
  dim, attn, ffn = config.dim, config.dim_attn, config.dim_ffn
  distances = (config.num_buckets, config.num_heads)  # UMT5 has a table per layer, T5 one in all
  self_attention, gated = "layer.0.SelfAttention", "layer.1.DenseReluDense"
  layer_parts = (  # original name, transformers' name, published shape, path here
    ("norm1", "layer.0.layer_norm", (dim,), "norm_attention/scale"),
    ("attn.q", f"{self_attention}.q", (attn, dim), "attention/q/kernel"),
    ("attn.k", f"{self_attention}.k", (attn, dim), "attention/k/kernel"),
    ("attn.v", f"{self_attention}.v", (attn, dim), "attention/v/kernel"),
    ("attn.o", f"{self_attention}.o", (dim, attn), "attention/o/kernel"),
    (
      "pos_embedding.embedding",
      f"{self_attention}.relative_attention_bias",
      distances,
      "attention/distance",
    ),
    ("norm2", "layer.1.layer_norm", (dim,), "norm_ffn/scale"),
    ("ffn.gate.0", f"{gated}.wi_0", (ffn, dim), "ffn/gate/kernel"),
    ("ffn.fc1", f"{gated}.wi_1", (ffn, dim), "ffn/up/kernel"),
    ("ffn.fc2", f"{gated}.wo", (dim, ffn), "ffn/down/kernel"),
  )
  embed, stem, norm = (
    ("token_embedding", "blocks", "norm")
    if layout == "original"
    else ("shared", "encoder.block", "encoder.final_layer_norm")
  )
  rules = [TensorMapping(f"{embed}.weight", (config.vocab, dim), ("embed", "embedding"))]
  for layer in range(config.num_layers):
    for *names, shape, path in layer_parts:
      name = f"{stem}.{layer}.{names[column]}.weight"
      kind = "linear" if path.endswith("kernel") else "same"
      rules.append(TensorMapping(name, shape, ("layers", *path.split("/")), kind, layer))
  return [*rules, TensorMapping(f"{norm}.weight", (dim,), ("norm", "scale"))]
