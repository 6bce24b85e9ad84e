"""Wan2.1's causal 3D autoencoder (arXiv 2503.20314, section 4.1, weights `Wan2.1_VAE`).

    video [b F H W 3] in [-1, 1]  <->  latents [b f h w c],   F = 1 + 4 (f - 1),  H = 8 h,  W = 8 w

The first frame stands alone, then every 4 frames make one latent frame. Deviations: the cache is an
argument and a result, and a call takes any number of frames (published: a list that modules mutate,
one latent frame per call); decoded pixels are not clamped to [-1, 1].

Both directions are causal in time, so a video can be coded in pieces: `encode_chunk` and
`decode_chunk` take the cache that the last piece returned (None at the start) and return the next.
The cache is a pytree of arrays whose shapes do not depend on how the video is cut. Latents are
normalised with the published mean and deviation.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models.vae_layers import (
  CausalConv,
  Downsample,
  FrameAttention,
  NormConv,
  Past,
  ResBlock,
  Upsample,
  chain,
)
from hiar_jax.types import Key, Params, PyTree, typed

# Wan2.1 VAE, mean and standard deviation of the 16 latent channels (published with the weights).
LATENTS_MEAN = (
  -0.7571,
  -0.7089,
  -0.9113,
  0.1075,
  -0.1745,
  0.9653,
  -0.1517,
  1.5508,
  0.4134,
  -0.0715,
  0.5517,
  -0.3632,
  -0.1922,
  -0.9497,
  0.2503,
  -0.2921,
)
LATENTS_STD = (
  2.8184,
  1.4541,
  2.3275,
  2.6558,
  1.2196,
  1.7708,
  2.6052,
  2.0743,
  3.2687,
  2.1526,
  2.8652,
  1.5579,
  1.6382,
  1.1253,
  2.8251,
  1.9160,
)

Pixels = Float[Array | np.ndarray, "b F H W 3"]
Latents = Float[Array | np.ndarray, "b f h w c"]


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes; the defaults are Wan2.1's. dtype: of activations and cache, not of weights."""

  dim: int = 96
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latents_mean: tuple[float, ...] = LATENTS_MEAN
  latents_std: tuple[float, ...] = LATENTS_STD
  dtype: Any = jnp.float32

  def __post_init__(self):
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise UserError(
        f"VAE: temporal_downsample has {len(self.temporal_downsample)} entries, dim_mult "
        f"{len(self.dim_mult)};"
        " it needs one fewer than dim_mult."
      )
    if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
      raise UserError(f"VAE: latents_mean and latents_std need z_dim={self.z_dim} entries each.")

  @property
  def spatial_factor(self) -> int:
    """Pixels per latent pixel, each way."""
    return 2 ** len(self.temporal_downsample)

  @property
  def temporal_factor(self) -> int:
    """Pixel frames per latent frame (after the first)."""
    return 2 ** sum(self.temporal_downsample)


class Encoder(nn.Module):
  """Pixels [b F H W 3] -> moments of the posterior [b f h w 2c], mean first."""

  config: VAEConfig

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    cfg, dtype = self.config, self.config.dtype
    layers = [CausalConv(cfg.dim, dtype, name="conv_in")]
    for i, mult in enumerate(cfg.dim_mult):
      layers += [
        ResBlock(cfg.dim * mult, dtype, name=f"down_{i}_res_{j}") for j in range(cfg.num_res_blocks)
      ]
      if i < len(cfg.temporal_downsample):
        layers += [Downsample(cfg.temporal_downsample[i], dtype, name=f"down_{i}_resample")]
    layers += [
      *_middle(cfg.dim * cfg.dim_mult[-1], dtype),
      NormConv(2 * cfg.z_dim, dtype, name="head"),
    ]
    return chain(layers, x, past)


class Decoder(nn.Module):
  """Latents [b f h w c], not normalised -> pixels [b F H W 3]."""

  config: VAEConfig

  @nn.compact
  def __call__(self, x: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    cfg, dtype = self.config, self.config.dtype
    # the encoder's stages backwards, with one more residual block each
    widths = [cfg.dim * mult for mult in reversed(cfg.dim_mult)]
    doubled = tuple(reversed(cfg.temporal_downsample))
    layers = [CausalConv(widths[0], dtype, name="conv_in"), *_middle(widths[0], dtype)]
    for i, width in enumerate(widths):
      layers += [
        ResBlock(width, dtype, name=f"up_{i}_res_{j}") for j in range(cfg.num_res_blocks + 1)
      ]
      if i < len(doubled):
        layers += [Upsample(doubled[i], dtype, name=f"up_{i}_resample")]
    return chain([*layers, NormConv(3, dtype, name="head")], x, past)


def _middle(width: int, dtype: Any) -> list[nn.Module]:
  # attention at the lowest resolution alone: its cost grows with the square of a frame's pixels
  return [
    ResBlock(width, dtype, name="mid_res_0"),
    FrameAttention(dtype, name="mid_attention"),
    ResBlock(width, dtype, name="mid_res_1"),
  ]


class WanVAE(nn.Module):
  """Both halves over one parameter tree; `encode` and `decode` are its methods for `apply`."""

  config: VAEConfig

  def setup(self):
    cfg = self.config
    self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
    # published as 1x1x1 convolutions (conv1, conv2)
    self.quant = nn.Dense(2 * cfg.z_dim, dtype=cfg.dtype)
    self.post_quant = nn.Dense(cfg.z_dim, dtype=cfg.dtype)

  def encode(self, video: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """Returns (normalised mean of the posterior, cache) of (pixels, cache)."""
    moments, past = self.encoder(video.astype(self.config.dtype), past)
    mean = self.quant(moments)[..., : self.config.z_dim]
    return normalise(mean.astype(jnp.float32), self.config), past

  def decode(self, latents: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """Returns (pixels, cache) of (normalised latents, cache)."""
    z = denormalise(latents.astype(jnp.float32), self.config)
    video, past = self.decoder(self.post_quant(z.astype(self.config.dtype)), past)
    return video.astype(jnp.float32), past

  def __call__(self, video: jax.Array) -> jax.Array:
    """Encodes and decodes; for `init`, which needs a pass through every parameter."""
    return self.decode(self.encode(video, None)[0], None)[0]


def normalise(latents: jax.Array, config: VAEConfig) -> jax.Array:
  """Returns latents as the diffusion model takes them: mean 0, deviation 1 per channel."""
  mean, std = (
    jnp.asarray(values, jnp.float32)[None, None, None, None]
    for values in (config.latents_mean, config.latents_std)
  )
  return (latents - mean) / std


def denormalise(latents: jax.Array, config: VAEConfig) -> jax.Array:
  """Returns the latents of normalised ones: the inverse of `normalise`."""
  std, mean = (
    jnp.asarray(values, jnp.float32)[None, None, None, None]
    for values in (config.latents_std, config.latents_mean)
  )
  return latents * std + mean


@typed
def encode_chunk(
  params: Params, video: Pixels, cache: PyTree, config: VAEConfig
) -> tuple[Latents, PyTree]:
  """Encodes the next frames: 1 + 4 m at the start of a video, where cache is None, 4 m after it.

  cache: else what the last call returned. Returns float32 latents (1 + m or m frames) and the cache
  for the next call. Raises UserError for other sizes.
  """
  check_pixels(video.shape, cache, config)
  check_cache("VAE", cache, "conv_in", video.shape[0], video.shape[2:4])
  return WanVAE(config).apply({"params": params}, video, cache, method="encode")


@typed
def decode_chunk(
  params: Params, latents: Latents, cache: PyTree, config: VAEConfig
) -> tuple[Pixels, PyTree]:
  """Decodes the next m >= 1 latent frames: 4 m - 3 pixel frames where cache is None, else 4 m.

  cache: None at the start of a video, else what the last call returned. Returns float32 pixels,
  which may overshoot [-1, 1] (clip when writing them), and the cache for the next call. Raises
  UserError for wrong channels or a cache of other sizes.
  """
  if latents.shape[-1] != config.z_dim or not latents.shape[1]:
    raise UserError(
      f"VAE: latents have shape {latents.shape}; expected [b f h w {config.z_dim}] with f >= 1."
    )
  check_cache("VAE", cache, "conv_in", latents.shape[0], latents.shape[2:4])
  return WanVAE(config).apply({"params": params}, latents, cache, method="decode")


def check_pixels(shape: tuple[int, ...], cache: PyTree, config: VAEConfig) -> None:
  """Raises UserError unless pixels of shape [b F H W 3] can be encoded.

  cache: None for the start of a video, anything else for a later piece.
  """
  _, frames, height, width, _ = shape
  s, t = config.spatial_factor, config.temporal_factor
  if height % s or width % s:
    raise UserError(
      f"VAE: frames of {height}x{width} do not fit; both sides must be multiples of {s}"
      f" (nearest: {max(s, round(height / s) * s)}x{max(s, round(width / s) * s)})."
    )
  alone = 1 if cache is None else 0
  if frames < 1 or (frames - alone) % t:
    form = f"1 + {t} m frames at the start of a video" if alone else f"{t} m frames after the start"
    raise UserError(
      f"VAE: {frames} frames do not fit; expected {form} (m whole). Cut or pad the clip."
    )


def check_cache(model: str, cache: PyTree, layer: str, batch: int, size: tuple[int, ...]) -> None:
  """Raises UserError unless a cache is None, or that of `batch` videos with frames of `size`.

  model: its name in the message. layer: the first one with a past; its frames [b f h w c] have the
  size of the input.
  """
  if cache is None:
    return
  past = cache[layer].shape
  if (past[0], *past[2:4]) != (batch, *size):
    raise UserError(
      f"{model}: the cache belongs to a batch of {past[0]} with frames of {past[2]}x{past[3]}, the "
      f"chunk is {batch} of {size[0]}x{size[1]}. Start a new video with cache=None."
    )


# (next frames, cache) -> (result, cache), either way
Step = Callable[[jax.Array, PyTree], tuple[jax.Array, PyTree]]


def stream(
  step: Step, first: jax.Array, rest: jax.Array, chunk: int, factor: int, unroll: bool = False
) -> jax.Array:
  """Runs `step` over first [b 1 ...], then over rest [b m ...] in groups of `chunk` latent frames,
  which have `factor` frames each.

  The groups run under one `jax.lax.scan`: beside input and result, memory does not grow with m. A
  shorter last group runs after it. Returns the results joined in time. Raises UserError for a chunk
  below 1.
  """
  if chunk < 1:
    raise UserError(
      f"VAE: chunk={chunk}; expected at least 1 latent frame, or None for a single pass."
    )
  group = chunk * factor
  # outside of the scan: a carry cannot go from None to a tree of arrays
  y, cache = step(first, None)
  results = [y]
  full = rest.shape[1] // group
  if full:
    # [b m ...] -> [full b group ...] for the scan, and its results back
    groups = rest[:, : full * group].reshape(rest.shape[0], full, group, *rest.shape[2:])
    cache, ys = jax.lax.scan(
      lambda c, x: step(x, c)[::-1], cache, jnp.moveaxis(groups, 1, 0), unroll=unroll
    )
    ys = jnp.moveaxis(ys, 0, 1)
    results.append(ys.reshape(ys.shape[0], full * ys.shape[2], *ys.shape[3:]))
  if rest.shape[1] % group:
    results.append(step(rest[:, full * group :], cache)[0])
  return jnp.concatenate(results, axis=1)


@typed
def encode(
  params: Params, video: Pixels, config: VAEConfig, chunk: int | None = 1, unroll: bool = False
) -> Latents:
  """Returns the normalised latents [b 1 + m h w c] of a whole video of 1 + 4 m frames.

  chunk: latent frames per scan step, None = one pass over all. unroll: writes the scan out, which
  compiles longer and lets the compiler overlap steps. Raises UserError for other sizes.
  """
  check_pixels(video.shape, None, config)
  if chunk is None:
    return encode_chunk(params, video, None, config)[0]
  return stream(
    lambda x, cache: encode_chunk(params, x, cache, config),
    video[:, :1],
    video[:, 1:],
    chunk,
    config.temporal_factor,
    unroll,
  )


@typed
def decode(
  params: Params, latents: Latents, config: VAEConfig, chunk: int | None = 1, unroll: bool = False
) -> Pixels:
  """Returns the pixels [b 1 + 4 (f - 1) H W 3] of a whole video; options as in `encode`."""
  if chunk is None:
    return decode_chunk(params, latents, None, config)[0]
  return stream(
    lambda z, cache: decode_chunk(params, z, cache, config),
    latents[:, :1],
    latents[:, 1:],
    chunk,
    1,
    unroll,
  )


def abstract_params(config: VAEConfig) -> Params:
  """Returns shapes and dtypes of the parameters; allocates nothing."""
  size = config.spatial_factor
  video = jax.ShapeDtypeStruct((1, 1 + config.temporal_factor, size, size, 3), jnp.float32)
  return jax.eval_shape(
    lambda video: WanVAE(config).init(jax.random.key(0), video)["params"], video
  )


@functools.partial(jax.jit, static_argnums=0)
def init(config: VAEConfig, key: Key) -> Params:
  """Returns random parameters (float32): kernels N(0, 1 / fan-in), gains 1, biases 0."""
  return draw_params(abstract_params(config), key)


def draw_params(shapes: Params, key: Key) -> Params:
  """Returns random parameters of the shapes of a tree, as `init`."""
  ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(shapes)])
  # One draw for all: compiling one for each of the many shapes takes longer than compiling the
  # decoder.
  draws = iter(jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1]))

  def leaf(path, shape):
    draw = next(draws).reshape(shape.shape)
    if path[-1].key == "kernel":
      return draw / math.sqrt(math.prod(shape.shape[:-1]))
    return jnp.full(shape.shape, float(path[-1].key == "gamma"))

  return jax.tree_util.tree_map_with_path(leaf, shapes)
