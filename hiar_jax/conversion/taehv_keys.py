"""Key maps of the tiny autoencoder (`taew2_1.pth`, `taew2_1.safetensors`).

The published encoder and decoder are lists of layers, and a tensor is named by its layer's index in
its list; layers without weights count too.
"""

from hiar_jax.conversion.key_maps import TensorMapping
from hiar_jax.models.taehv import TinyVAEConfig


def _conv(
  name: str, fan_in: int, width: int, path: tuple[str, ...], bias: bool = True
) -> list[TensorMapping]:
  rules = [TensorMapping(f"{name}.weight", (width, fan_in, 3, 3), (*path, "kernel"), "conv")]
  return [*rules, TensorMapping(f"{name}.bias", (width,), (*path, "bias"))] if bias else rules


def _pointwise(name: str, fan_in: int, width: int, path: tuple[str, ...]) -> list[TensorMapping]:
  # A 1x1 convolution without bias, a linear layer here.
  return [TensorMapping(f"{name}.weight", (width, fan_in, 1, 1), (*path, "kernel"), "linear")]


def _memory(half: str, first: int, stage: int, width: int, blocks: int) -> list[TensorMapping]:
  """Returns the rules of a stage's memory blocks, layers `first` to `first + blocks - 1`."""
  rules = []
  for j in range(blocks):
    for i in range(3):
      # Every second layer of `conv` is a ReLU. The first convolution sees two frames: its own and
      # the one before.
      name = f"{half}.{first + j}.conv.{2 * i}"
      path = (half, f"memory_{stage}_{j}", f"conv_{i}")
      rules += _conv(name, 2 * width if i == 0 else width, width, path)
  return rules


def tiny_vae_key_map(config: TinyVAEConfig) -> list[TensorMapping]:
  """Returns one rule per published tensor, the encoder's first."""
  width = config.encoder_width
  index = 2  # after the first convolution and its ReLU
  rules = _conv("encoder.0", 3, width, ("encoder", "conv_in"))
  for stage, time in enumerate(config.temporal_downsample):
    path = ("encoder", f"down_{stage}")
    fan_in = width * (2 if time else 1)  # pooling in time joins two frames in the channels
    rules += _pointwise(f"encoder.{index}.conv", fan_in, width, (*path, "pool"))
    rules += _conv(f"encoder.{index + 1}", width, width, (*path, "conv"), bias=False)
    rules += _memory("encoder", index + 2, stage, width, config.blocks)
    index += 2 + config.blocks
  rules += _conv(f"encoder.{index}", width, config.z_dim, ("encoder", "conv_out"))

  widths = config.decoder_widths
  index = 3  # after the clamp, the first convolution and its ReLU
  rules += _conv("decoder.1", config.z_dim, widths[0], ("decoder", "conv_in"))
  for stage, time in enumerate(config.temporal_upsample):
    width, out = widths[stage], widths[stage + 1]
    path = ("decoder", f"up_{stage}")
    rules += _memory("decoder", index, stage, width, config.blocks)
    index += config.blocks + 1  # the upsampling in space has no weights
    grown = width * (2 if time else 1)  # upsampling in time makes two frames, in the channels
    rules += _pointwise(f"decoder.{index}.conv", width, grown, (*path, "grow"))
    rules += _conv(f"decoder.{index + 1}", width, out, (*path, "conv"), bias=False)
    index += 2
  # At `index` is a ReLU.
  return rules + _conv(f"decoder.{index + 1}", widths[-1], 3, ("decoder", "conv_out"))
