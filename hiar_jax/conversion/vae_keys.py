"""Key maps of the VAE: Wan2.1's original names (`Wan2.1_VAE.pth`) and diffusers' (`vae/`)."""

from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.errors import UserError
from hiar_jax.models.vae import VAEConfig

LAYOUTS = ("original", "diffusers")

# Parts of a residual block: original name, diffusers' name, path here; `column`, below, is the
# layout's place among the names. Layers 1, 4 and 5 of the original list (SiLU, SiLU, dropout) have
# no weights.
_HALVES = (
  ("residual.0", "norm1", ("half_0", "norm")),
  ("residual.2", "conv1", ("half_0", "causal", "conv")),
  ("residual.3", "norm2", ("half_1", "norm")),
  ("residual.6", "conv2", ("half_1", "causal", "conv")),
)


def _norm(name: str, width: int, path: tuple[str, ...], axes: int = 3) -> list[TensorMapping]:
  # Published as [c, 1, 1, 1], or [c, 1, 1] (axes = 2) where the layer works on single frames.
  return [TensorMapping(f"{name}.gamma", (width, *(1,) * axes), (*path, "gamma"), "vector")]


def _conv(name: str, shape: tuple[int, ...], path: tuple[str, ...]) -> list[TensorMapping]:
  pointwise = all(size == 1 for size in shape[2:])
  return [
    TensorMapping(f"{name}.weight", shape, (*path, "kernel"), "linear" if pointwise else "conv"),
    TensorMapping(f"{name}.bias", shape[:1], (*path, "bias")),
  ]


def _res(
  name: str, fan_in: int, width: int, path: tuple[str, ...], column: int
) -> list[TensorMapping]:
  """Returns the rules of a residual block; only one that changes the width has a shortcut."""
  rules = []
  for i, (*names, part) in enumerate(_HALVES):
    source = fan_in if i < 2 else width
    if part[-1] == "norm":
      rules += _norm(f"{name}.{names[column]}", source, (*path, *part))
    else:
      rules += _conv(f"{name}.{names[column]}", (width, source, 3, 3, 3), (*path, *part))
  if fan_in != width:
    shortcut = ("shortcut", "conv_shortcut")[column]
    rules += _conv(f"{name}.{shortcut}", (width, fan_in, 1, 1, 1), (*path, "shortcut"))
  return rules


def _ends_and_middle(
  half: str, fan_in: int, first: int, last: int, out: int, middle: int, column: int
) -> list[TensorMapping]:
  """Returns the rules of what both halves have: the first (fan_in -> first) and the last
  (last -> out) convolution, and the middle: residual block, attention, residual block.
  """
  name = f"{half}.{('conv1', 'conv_in')[column]}"
  rules = _conv(name, (first, fan_in, 3, 3, 3), (half, "conv_in", "conv"))
  name = f"{half}.{('head.0', 'norm_out')[column]}"
  rules += _norm(name, last, (half, "head", "norm"))
  name = f"{half}.{('head.2', 'conv_out')[column]}"
  rules += _conv(name, (out, last, 3, 3, 3), (half, "head", "causal", "conv"))
  blocks = (("middle.0", "mid_block.resnets.0"), ("middle.2", "mid_block.resnets.1"))
  for i, names in enumerate(blocks):
    rules += _res(f"{half}.{names[column]}", middle, middle, (half, f"mid_res_{i}"), column)
  name = f"{half}.{('middle.1', 'mid_block.attentions.0')[column]}"
  path = (half, "mid_attention")
  rules += _norm(f"{name}.norm", middle, (*path, "norm"), axes=2)
  # Attention within a frame: its projections are 1x1 convolutions, linear layers here.
  rules += _conv(f"{name}.to_qkv", (3 * middle, middle, 1, 1), (*path, "qkv"))
  return rules + _conv(f"{name}.proj", (middle, middle, 1, 1), (*path, "out"))


def _encoder(config: VAEConfig, column: int) -> list[TensorMapping]:
  widths = [config.dim * mult for mult in config.dim_mult]
  # 2 z_dim: mean and log variance.
  rules = _ends_and_middle(
    "encoder", 3, config.dim, widths[-1], 2 * config.z_dim, widths[-1], column
  )
  # Both layouts number blocks and resamplings of all stages in one list.
  stem = f"encoder.{('downsamples', 'down_blocks')[column]}"
  index, fan_in = 0, config.dim
  for i, width in enumerate(widths):
    for j in range(config.num_res_blocks):
      rules += _res(f"{stem}.{index}", fan_in, width, ("encoder", f"down_{i}_res_{j}"), column)
      index, fan_in = index + 1, width
    if i < len(config.temporal_downsample):
      path = ("encoder", f"down_{i}_resample")
      rules += _conv(f"{stem}.{index}.resample.1", (width, width, 3, 3), (*path, "conv"))
      if config.temporal_downsample[i]:
        rules += _conv(f"{stem}.{index}.time_conv", (width, width, 3, 1, 1), (*path, "time_conv"))
      index += 1
  return rules


def _decoder(config: VAEConfig, column: int) -> list[TensorMapping]:
  widths = [config.dim * mult for mult in reversed(config.dim_mult)]
  doubled = tuple(reversed(config.temporal_downsample))
  rules = _ends_and_middle("decoder", config.z_dim, widths[0], widths[-1], 3, widths[0], column)
  # The original layout numbers all stages in one list, diffusers each stage for itself.
  index, fan_in = 0, widths[0]
  for i, width in enumerate(widths):
    for j in range(config.num_res_blocks + 1):  # one more than in the encoder
      names = (f"decoder.upsamples.{index}", f"decoder.up_blocks.{i}.resnets.{j}")
      rules += _res(names[column], fan_in, width, ("decoder", f"up_{i}_res_{j}"), column)
      index, fan_in = index + 1, width
    if i < len(doubled):
      names = (f"decoder.upsamples.{index}", f"decoder.up_blocks.{i}.upsamplers.0")
      path = ("decoder", f"up_{i}_resample")
      rules += _conv(f"{names[column]}.resample.1", (width // 2, width, 3, 3), (*path, "conv"))
      if doubled[i]:
        shape = (2 * width, width, 3, 1, 1)
        rules += _conv(f"{names[column]}.time_conv", shape, (*path, "time_conv"))
      index, fan_in = index + 1, width // 2  # upsampling halves the channels
  return rules


def vae_key_map(config: VAEConfig, layout: str = "original") -> list[TensorMapping]:
  """Returns one rule per published tensor.

  layout: "original" (Wan2.1's names) or "diffusers" (AutoencoderKLWan's). Raises UserError for
  another.
  """
  if layout not in LAYOUTS:
    raise UserError(f"VAE: unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
  column, z = LAYOUTS.index(layout), config.z_dim
  quant, post_quant = (("conv1", "conv2"), ("quant_conv", "post_quant_conv"))[column]
  return [
    *_encoder(config, column),
    *_conv(quant, (2 * z, 2 * z, 1, 1, 1), ("quant",)),
    *_conv(post_quant, (z, z, 1, 1, 1), ("post_quant",)),
    *_decoder(config, column),
  ]
