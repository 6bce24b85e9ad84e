"""Key maps of the VAE: Wan2.1's original names (`Wan2.1_VAE.pth`) and diffusers' (`vae/`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.conversion.key_maps import TensorMapping, from_published, to_published
from hiar_jax.errors import UserError
from hiar_jax.models.vae import VAEConfig
from hiar_jax.types import Params

LAYOUTS = ("original", "diffusers")

# Parts of a residual block: original name, diffusers' name, path here. Of the original list, layers
# 1, 4 and 5 (SiLU, SiLU, dropout) have no weights.
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


class _Layout:
  """Rules of one layout. Methods return those of a part of the network."""

  def __init__(self, layout: str):
    if layout not in LAYOUTS:
      raise UserError(f"VAE: unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    self.original = layout == "original"

  def pick(self, original: str, diffusers: str) -> str:
    """Returns the name in this layout."""
    return original if self.original else diffusers

  def res(self, name: str, fan_in: int, width: int, path: tuple[str, ...]) -> list[TensorMapping]:
    """Returns the rules of a residual block; only one that changes the width has a shortcut."""
    rules = []
    for i, (original, diffusers, part) in enumerate(_HALVES):
      full = f"{name}.{self.pick(original, diffusers)}"
      source = fan_in if i < 2 else width
      if part[-1] == "norm":
        rules += _norm(full, source, (*path, *part))
      else:
        rules += _conv(full, (width, source, 3, 3, 3), (*path, *part))
    if fan_in != width:
      rules += _conv(
        f"{name}.{self.pick('shortcut', 'conv_shortcut')}",
        (width, fan_in, 1, 1, 1),
        (*path, "shortcut"),
      )
    return rules

  def middle(self, half: str, width: int) -> list[TensorMapping]:
    """Returns the rules of the middle: residual block, attention, residual block."""
    rules = []
    blocks = (("middle.0", "mid_block.resnets.0"), ("middle.2", "mid_block.resnets.1"))
    for i, (original, diffusers) in enumerate(blocks):
      rules += self.res(
        f"{half}.{self.pick(original, diffusers)}", width, width, (half, f"mid_res_{i}")
      )
    name = f"{half}.{self.pick('middle.1', 'mid_block.attentions.0')}"
    path = (half, "mid_attention")
    rules += _norm(f"{name}.norm", width, (*path, "norm"), axes=2)
    # Attention within a frame: its projections are 1x1 convolutions, linear layers here.
    rules += _conv(f"{name}.to_qkv", (3 * width, width, 1, 1), (*path, "qkv"))
    return rules + _conv(f"{name}.proj", (width, width, 1, 1), (*path, "out"))

  def ends(self, half: str, fan_in: int, first: int, last: int, out: int) -> list[TensorMapping]:
    """Returns the rules of the first (fan_in -> first) and last (last -> out) convolutions."""
    rules = _conv(
      f"{half}.{self.pick('conv1', 'conv_in')}", (first, fan_in, 3, 3, 3), (half, "conv_in", "conv")
    )
    rules += _norm(f"{half}.{self.pick('head.0', 'norm_out')}", last, (half, "head", "norm"))
    head = (half, "head", "causal", "conv")
    return rules + _conv(f"{half}.{self.pick('head.2', 'conv_out')}", (out, last, 3, 3, 3), head)

  def encoder(self, config: VAEConfig) -> list[TensorMapping]:
    widths = [config.dim * mult for mult in config.dim_mult]
    # 2 z_dim: mean and log variance.
    rules = self.ends("encoder", 3, config.dim, widths[-1], 2 * config.z_dim)
    rules += self.middle("encoder", widths[-1])
    # Both layouts number blocks and resamplings of all stages in one list.
    stem = f"encoder.{self.pick('downsamples', 'down_blocks')}"
    index, fan_in = 0, config.dim
    for i, width in enumerate(widths):
      for j in range(config.num_res_blocks):
        rules += self.res(f"{stem}.{index}", fan_in, width, ("encoder", f"down_{i}_res_{j}"))
        index, fan_in = index + 1, width
      if i < len(config.temporal_downsample):
        path = ("encoder", f"down_{i}_resample")
        rules += _conv(f"{stem}.{index}.resample.1", (width, width, 3, 3), (*path, "conv"))
        if config.temporal_downsample[i]:
          rules += _conv(f"{stem}.{index}.time_conv", (width, width, 3, 1, 1), (*path, "time_conv"))
        index += 1
    return rules

  def decoder(self, config: VAEConfig) -> list[TensorMapping]:
    widths = [config.dim * mult for mult in reversed(config.dim_mult)]
    doubled = tuple(reversed(config.temporal_downsample))
    rules = self.ends("decoder", config.z_dim, widths[0], widths[-1], 3)
    rules += self.middle("decoder", widths[0])
    # The original layout numbers all stages in one list, diffusers each stage for itself.
    index, fan_in = 0, widths[0]
    for i, width in enumerate(widths):
      for j in range(config.num_res_blocks + 1):  # one more than in the encoder
        name = self.pick(f"decoder.upsamples.{index}", f"decoder.up_blocks.{i}.resnets.{j}")
        rules += self.res(name, fan_in, width, ("decoder", f"up_{i}_res_{j}"))
        index, fan_in = index + 1, width
      if i < len(doubled):
        name = self.pick(f"decoder.upsamples.{index}", f"decoder.up_blocks.{i}.upsamplers.0")
        path = ("decoder", f"up_{i}_resample")
        rules += _conv(f"{name}.resample.1", (width // 2, width, 3, 3), (*path, "conv"))
        if doubled[i]:
          rules += _conv(f"{name}.time_conv", (2 * width, width, 3, 1, 1), (*path, "time_conv"))
        index, fan_in = index + 1, width // 2  # upsampling halves the channels
    return rules


def vae_key_map(config: VAEConfig, layout: str = "original") -> list[TensorMapping]:
  """Returns one rule per published tensor.

  layout: "original" (Wan2.1's names) or "diffusers" (AutoencoderKLWan's). Raises UserError for
  another.
  """
  names, z = _Layout(layout), config.z_dim
  return [
    *names.encoder(config),
    *_conv(names.pick("conv1", "quant_conv"), (2 * z, 2 * z, 1, 1, 1), ("quant",)),
    *_conv(names.pick("conv2", "post_quant_conv"), (z, z, 1, 1, 1), ("post_quant",)),
    *names.decoder(config),
  ]


def vae_params_from_published(
  named: Mapping[str, Any], config: VAEConfig, layout: str = "original"
) -> Params:
  """Returns parameters from named tensors. Raises UserError if names or shapes do not fit."""
  return from_published(named, vae_key_map(config, layout), f"VAE ({layout} names)")


def vae_params_to_published(
  params: Params, config: VAEConfig, layout: str = "original"
) -> dict[str, np.ndarray]:
  """Returns named tensors; the exact inverse of `vae_params_from_published`."""
  return to_published(params, vae_key_map(config, layout), f"VAE ({layout} names)")
