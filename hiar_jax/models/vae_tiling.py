"""Spatial tiling of models.vae for devices with little memory: overlapping tiles, blended seams.

    y(p) = sum_i w_i(p) y_i(p) / sum_i w_i(p)

w_i is 1 inside tile i and falls linearly to 0 over its seams. Tiles run one after another.

The middle of the VAE attends over a whole frame, so a tiled result is close to the untiled one, not
equal; with one tile it is equal. In a stream of pieces the cache holds each tile's own cache,
[tiles, ...].
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.models import vae
from hiar_jax.types import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Side of a tile and least overlap of neighbours, in latent pixels (8 pixels of the video each).

  The defaults cut 480x832 (60x104 latent pixels) into 3 x 5 tiles of 256x256 pixels.
  """

  size: int = 32
  overlap: int = 8

  def __post_init__(self):
    if not 0 < self.overlap < self.size:
      raise UserError(
        f"VAE tiling: overlap={self.overlap} of tiles of {self.size}; expected 0 < overlap < size."
      )


def starts(length: int, tiling: Tiling) -> list[int]:
  """Returns the first pixel of each tile along a side of `length`; the last one ends with it."""
  if length <= tiling.size:
    return [0]
  count = math.ceil((length - tiling.overlap) / (tiling.size - tiling.overlap))
  # evenly spread, so overlaps are at least the asked one
  return [round(i * (length - tiling.size) / (count - 1)) for i in range(count)]


def ramp(length: int, seam: int, before: bool, after: bool) -> np.ndarray:
  """Returns the weights [length] along one side of a tile.

  They rise over the first `seam` pixels if there is a neighbour before, and fall over the last ones
  if there is one after.
  """
  position = np.arange(length, dtype=np.float32)  # + 0.5: pixel centres, so no weight is 0
  weight = np.ones(length, np.float32)
  if before:
    weight = np.minimum(weight, (position + 0.5) / seam)
  return np.minimum(weight, (length - position - 0.5) / seam) if after else weight


def _grid(height: int, width: int, tiling: Tiling) -> tuple[list[tuple[int, int]], int, int]:
  """Returns (first row and column of each tile, height of a tile, width); all in latent pixels."""
  corners = [(y, x) for y in starts(height, tiling) for x in starts(width, tiling)]
  return corners, min(height, tiling.size), min(width, tiling.size)


def cut(video: jax.Array, tiling: Tiling, scale: int = 1) -> jax.Array:
  """Cuts [b f h w c] into [tiles b f th tw c]; `scale` pixels of the array per latent pixel."""
  corners, height, width = _grid(video.shape[2] // scale, video.shape[3] // scale, tiling)
  return jnp.stack(
    [
      video[:, :, y * scale : (y + height) * scale, x * scale : (x + width) * scale]
      for y, x in corners
    ]
  )


def blend(tiles: jax.Array, height: int, width: int, tiling: Tiling, scale: int = 1) -> jax.Array:
  """Joins [tiles b f th tw c] into [b f h w c]: the inverse of `cut`.

  height, width: of the whole frame, in latent pixels.
  """
  if tiles.shape[0] == 1:
    return tiles[0]
  corners, tile_height, tile_width = _grid(height, width, tiling)
  seam = tiling.overlap * scale
  total = jnp.zeros(
    (*tiles.shape[1:3], height * scale, width * scale, tiles.shape[-1]), tiles.dtype
  )
  # weights are the same for every batch entry, frame and channel
  weights = np.zeros((1, 1, height * scale, width * scale, 1), np.float32)
  for tile, (y, x) in zip(tiles, corners, strict=True):
    rows = ramp(tile.shape[2], seam, y > 0, y + tile_height < height)
    columns = ramp(tile.shape[3], seam, x > 0, x + tile_width < width)
    weight = np.outer(rows, columns)[None, None, :, :, None]
    area = np.s_[:, :, y * scale : y * scale + tile.shape[2], x * scale : x * scale + tile.shape[3]]
    total = total.at[area].add(weight * tile)
    weights[area] += weight
  return total / weights


def _map_tiles(
  code_chunk: Callable[..., tuple[jax.Array, PyTree]],
  params: Params,
  tiles: jax.Array,
  cache: PyTree,
  config: vae.VAEConfig,
) -> tuple[jax.Array, PyTree]:
  """Runs `vae.encode_chunk` or `vae.decode_chunk` on every tile.

  Raises UserError where the cache belongs to another tiling.
  """
  if cache is not None and cache["conv_in"].shape[:1] != tiles.shape[:1]:
    raise UserError(
      f"VAE tiling: the cache belongs to {cache['conv_in'].shape[0]} tiles, the chunk is cut into "
      f"{tiles.shape[0]}."
      " Keep one tiling for the whole video."
    )
  # lax.map runs tile after tile: the memory of one tile's activations, however many there are.
  return jax.lax.map(lambda tile: code_chunk(params, tile[0], tile[1], config), (tiles, cache))


def encode_chunk(
  params: Params, video: vae.Pixels, cache: PyTree, config: vae.VAEConfig, tiling: Tiling
) -> tuple[vae.Latents, PyTree]:
  """Runs `vae.encode_chunk` in tiles; the cache is for this tiling only."""
  vae.check_pixels(video.shape, cache, config)
  scale = config.spatial_factor
  tiles, cache = _map_tiles(vae.encode_chunk, params, cut(video, tiling, scale), cache, config)
  return blend(tiles, video.shape[2] // scale, video.shape[3] // scale, tiling), cache


def decode_chunk(
  params: Params, latents: vae.Latents, cache: PyTree, config: vae.VAEConfig, tiling: Tiling
) -> tuple[vae.Pixels, PyTree]:
  """Runs `vae.decode_chunk` in tiles; the cache is for this tiling only."""
  tiles, cache = _map_tiles(vae.decode_chunk, params, cut(latents, tiling), cache, config)
  return blend(tiles, latents.shape[2], latents.shape[3], tiling, config.spatial_factor), cache


def encode(
  params: Params,
  video: vae.Pixels,
  config: vae.VAEConfig,
  tiling: Tiling,
  chunk: int | None = 1,
  unroll: bool = False,
) -> vae.Latents:
  """Runs `vae.encode` on the whole video of one tile after another: one tile's cache in memory."""
  vae.check_pixels(video.shape, None, config)
  scale = config.spatial_factor
  tiles = jax.lax.map(
    lambda tile: vae.encode(params, tile, config, chunk, unroll), cut(video, tiling, scale)
  )
  return blend(tiles, video.shape[2] // scale, video.shape[3] // scale, tiling)


def decode(
  params: Params,
  latents: vae.Latents,
  config: vae.VAEConfig,
  tiling: Tiling,
  chunk: int | None = 1,
  unroll: bool = False,
) -> vae.Pixels:
  """Runs `vae.decode` on the whole video of one tile after another: one tile's cache in memory."""
  tiles = jax.lax.map(
    lambda tile: vae.decode(params, tile, config, chunk, unroll), cut(latents, tiling)
  )
  return blend(tiles, latents.shape[2], latents.shape[3], tiling, config.spatial_factor)
