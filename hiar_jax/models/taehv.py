"""TAEHV, a tiny autoencoder of Wan2.1's latents (github.com/madebyollin/taehv, weights `taew2_1`).

The functions are those of models.vae: pixels [b F H W 3] in [-1, 1] <-> normalised latents
[b f h w c], F = 1 + 4 (f - 1). The network itself works on pixels in [0, 1], and on latents as the
diffusion model takes them, without a mean and deviation of its own.

Deviations: upsampling in time and in space are exchanged (the same result, see Grow); the memory is
an argument and a result.

A memory block sees its own frame and the one before, so a video can be decoded in pieces of any
lengths: the memory is a pytree, one past frame per block. Decoding is causal. Encoding is not
quite: as published, a video is cut into groups of 4 frames from its start, each of which makes one
latent, and the last group is filled up with the last frame.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hiar_jax.errors import UserError
from hiar_jax.models import vae
from hiar_jax.models.vae import Latents, Pixels
from hiar_jax.models.vae_layers import SPATIAL, Past, chain
from hiar_jax.types import Key, Params, PyTree, typed

BOUND = 3.0  # the decoder squashes its input into (-3, 3), as published


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
  """Sizes; the defaults are those of `taew2_1`. dtype: of activations and memory, not of weights.

  encoder_width: of every encoder stage; decoder_widths: of the stages, and of the last one's
  output; blocks: memory blocks per stage.
  """

  z_dim: int = 16
  encoder_width: int = 64
  decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
  blocks: int = 3
  temporal_downsample: tuple[bool, ...] = (True, True, False)
  temporal_upsample: tuple[bool, ...] = (False, True, True)
  dtype: Any = jnp.float32

  def __post_init__(self):
    stages = len(self.decoder_widths) - 1
    if not len(self.temporal_downsample) == len(self.temporal_upsample) == stages:
      raise UserError(
        f"tiny VAE: {len(self.decoder_widths)} decoder_widths make {stages} stages; "
        "temporal_downsample and temporal_upsample"
        f" have {len(self.temporal_downsample)} and {len(self.temporal_upsample)} entries, "
        f"expected {stages} each."
      )
    if sum(self.temporal_downsample) != sum(self.temporal_upsample):
      raise UserError(
        "tiny VAE: temporal_downsample and temporal_upsample must change the frame rate equally "
        "often."
      )

  @property
  def spatial_factor(self) -> int:
    """Pixels per latent pixel, each way."""
    return 2 ** len(self.temporal_upsample)

  @property
  def temporal_factor(self) -> int:
    """Pixel frames per latent frame (after the first)."""
    return 2 ** sum(self.temporal_upsample)


class MemoryBlock(nn.Module):
  """x + three convolutions over the frame and the one before it.

  past: the last frame, [b 1 h w c]; zeros before the first.
  """

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    if past is None:
      past = jnp.zeros_like(x[:, :1])
    # channels: [own frame | the frame before]
    y = jnp.concatenate([x, jnp.concatenate([past, x[:, :-1]], axis=1)], axis=-1)
    for i in range(3):
      y = nn.Conv(self.features, (3, 3), padding=SPATIAL, dtype=self.dtype, name=f"conv_{i}")(y)
      y = jax.nn.relu(y) if i < 2 else y
    return jax.nn.relu(x + y), x[:, -1:]


class Shrink(nn.Module):
  """Merges pairs of frames (with `time`), then halves height and width.

  Needs no past: frames come in whole groups.
  """

  features: int
  time: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    if self.time:
      b, f, h, w, c = x.shape
      # a pair's channels side by side, the earlier frame first: [b f/2 h w 2*c]
      x = (
        x.reshape(b, f // 2, 2, h, w, c).transpose(0, 1, 3, 4, 2, 5).reshape(b, f // 2, h, w, 2 * c)
      )
    x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="pool")(x)
    conv = nn.Conv(
      self.features,
      (3, 3),
      strides=2,
      padding=SPATIAL,
      use_bias=False,
      dtype=self.dtype,
      name="conv",
    )
    return conv(x), None


class Grow(nn.Module):
  """Makes two frames of each (with `time`), then doubles height and width; no past."""

  features: int
  time: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    b, f, h, w, c = x.shape
    times = 2 if self.time else 1
    # Published: first larger, then more frames. The latter is pointwise, so the order does not
    # matter to the result, and this one takes 25 % of the operations.
    x = nn.Dense(times * c, use_bias=False, dtype=self.dtype, name="grow")(x)
    x = x.reshape(b, f, h, w, times, c).transpose(0, 1, 4, 2, 3, 5).reshape(b, f * times, h, w, c)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return nn.Conv(
      self.features, (3, 3), padding=SPATIAL, use_bias=False, dtype=self.dtype, name="conv"
    )(x), None


class Encoder(nn.Module):
  """Pixels [b 4m H W 3] in [0, 1] -> latents [b m h w c]."""

  config: TinyVAEConfig

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    cfg = self.config
    width = cfg.encoder_width
    x = jax.nn.relu(nn.Conv(width, (3, 3), padding=SPATIAL, dtype=cfg.dtype, name="conv_in")(x))
    # only layers in the chain have a memory; the two convolutions around it see one frame
    layers: list[nn.Module] = []
    for i, time in enumerate(cfg.temporal_downsample):
      layers += [Shrink(width, time, cfg.dtype, name=f"down_{i}"), *_memory(i, width, cfg)]
    x, past = chain(layers, x, past)
    return nn.Conv(cfg.z_dim, (3, 3), padding=SPATIAL, dtype=cfg.dtype, name="conv_out")(x), past


class Decoder(nn.Module):
  """Latents [b f h w c] -> pixels [b 4f H W 3], nominally in [0, 1]."""

  config: TinyVAEConfig

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    cfg = self.config
    x = jnp.tanh(x / BOUND) * BOUND
    x = jax.nn.relu(
      nn.Conv(cfg.decoder_widths[0], (3, 3), padding=SPATIAL, dtype=cfg.dtype, name="conv_in")(x)
    )
    layers: list[nn.Module] = []
    for i, time in enumerate(cfg.temporal_upsample):
      layers += [
        *_memory(i, cfg.decoder_widths[i], cfg),
        Grow(cfg.decoder_widths[i + 1], time, cfg.dtype, name=f"up_{i}"),
      ]
    x, past = chain(layers, x, past)
    return nn.Conv(3, (3, 3), padding=SPATIAL, dtype=cfg.dtype, name="conv_out")(
      jax.nn.relu(x)
    ), past


def _memory(stage: int, width: int, config: TinyVAEConfig) -> Sequence[nn.Module]:
  return [
    MemoryBlock(width, config.dtype, name=f"memory_{stage}_{j}") for j in range(config.blocks)
  ]


class TinyVAE(nn.Module):
  """Both halves over one parameter tree; `encode` and `decode` are its methods for `apply`."""

  config: TinyVAEConfig

  def setup(self):
    self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

  def encode(self, video: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """Returns (latents, memory) of (pixels of whole groups, memory)."""
    latents, past = self.encoder(
      ((video.astype(jnp.float32) + 1) / 2).astype(self.config.dtype), past
    )
    return latents.astype(jnp.float32), past

  def decode(self, latents: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """Returns (pixels, memory) of (latents, memory)."""
    video, new_past = self.decoder(latents.astype(self.config.dtype), past)
    if past is None:  # a video's first latent stands for one frame, the last of its four
      video = video[:, self.config.temporal_factor - 1 :]
    return jnp.clip(video.astype(jnp.float32), 0, 1) * 2 - 1, new_past

  def __call__(self, video: jax.Array) -> jax.Array:
    """Encodes and decodes; for `init`, which needs a pass through every parameter."""
    return self.decode(self.encode(video, None)[0], None)[0]


@typed
def encode_chunk(
  params: Params, video: Pixels, memory: PyTree, config: TinyVAEConfig
) -> tuple[Latents, PyTree]:
  """Encodes the next 4 m frames, in [-1, 1].

  memory: None at the start of a video, else what the last call returned. Returns m float32 latents
  and the memory for the next call. Unlike the VAE's, a video's first latent takes 4 frames, and the
  caller fills up the end, as `encode` does. Raises UserError for other sizes.
  """
  vae.check_pixels((video.shape[0], 1, *video.shape[2:]), None, config)  # the sides alone
  if not video.shape[1] or video.shape[1] % config.temporal_factor:
    raise UserError(
      f"tiny VAE: {video.shape[1]} frames do not fit; a piece to encode has "
      f"{config.temporal_factor} m frames (m whole)."
    )
  size = (video.shape[2] // 2, video.shape[3] // 2)  # at the first memory block, after `down_0`
  if config.blocks:
    vae.check_cache("tiny VAE", memory, "memory_0_0", video.shape[0], size)
  return TinyVAE(config).apply({"params": params}, video, memory, method="encode")


@typed
def decode_chunk(
  params: Params, latents: Latents, memory: PyTree, config: TinyVAEConfig
) -> tuple[Pixels, PyTree]:
  """Decodes the next m >= 1 latent frames: 4 m - 3 pixel frames where memory is None, else 4 m.

  memory: None at the start of a video, else what the last call returned. Returns float32 pixels in
  [-1, 1] and the memory for the next call. Raises UserError for wrong channels or a memory of other
  sizes.
  """
  if latents.shape[-1] != config.z_dim or not latents.shape[1]:
    raise UserError(
      f"tiny VAE: latents have shape {latents.shape}; expected [b f h w {config.z_dim}] with f >= "
      "1."
    )
  if config.blocks:
    vae.check_cache("tiny VAE", memory, "memory_0_0", latents.shape[0], latents.shape[2:4])
  return TinyVAE(config).apply({"params": params}, latents, memory, method="decode")


@typed
def encode(
  params: Params, video: Pixels, config: TinyVAEConfig, chunk: int | None = 1, unroll: bool = False
) -> Latents:
  """Returns the latents [b 1 + m h w c] of a whole video of 1 + 4 m frames.

  chunk: latent frames per scan step, None = one pass over all. unroll: writes the scan out. Raises
  UserError for other sizes.
  """
  vae.check_pixels(video.shape, None, config)
  factor = config.temporal_factor
  video = jnp.asarray(video)
  # the last group is filled up with copies of the last frame
  video = jnp.concatenate([video, *[video[:, -1:]] * (-video.shape[1] % factor)], axis=1)
  if chunk is None:
    return encode_chunk(params, video, None, config)[0]
  return vae.stream(
    lambda x, memory: encode_chunk(params, x, memory, config),
    video[:, :factor],
    video[:, factor:],
    chunk,
    factor,
    unroll,
  )


@typed
def decode(
  params: Params,
  latents: Latents,
  config: TinyVAEConfig,
  chunk: int | None = 1,
  unroll: bool = False,
) -> Pixels:
  """Returns the pixels [b 1 + 4 (f - 1) H W 3] of a whole video; options as in `encode`."""
  if chunk is None:
    return decode_chunk(params, latents, None, config)[0]
  return vae.stream(
    lambda z, memory: decode_chunk(params, z, memory, config),
    latents[:, :1],
    latents[:, 1:],
    chunk,
    1,
    unroll,
  )


def abstract_params(config: TinyVAEConfig) -> Params:
  """Returns shapes and dtypes of the parameters; allocates nothing."""
  video = jax.ShapeDtypeStruct(
    (1, config.temporal_factor, config.spatial_factor, config.spatial_factor, 3), jnp.float32
  )
  return jax.eval_shape(
    lambda video: TinyVAE(config).init(jax.random.key(0), video)["params"], video
  )


@functools.partial(jax.jit, static_argnums=0)
def init(config: TinyVAEConfig, key: Key) -> Params:
  """Returns random parameters (float32): kernels N(0, 1 / fan-in), biases 0."""
  return vae.draw_params(abstract_params(config), key)
