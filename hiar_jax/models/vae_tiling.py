"""Spatial tiling of the VAE for small memories: overlapping tiles one after another, seams blended.

    y(p) = sum_i w_i(p) y_i(p) / sum_i w_i(p)

w_i is 1 inside tile i and falls linearly to 0 over its seams.

The middle of the VAE attends over a whole frame, so a tiled result is close to the untiled one, not
equal; with one tile it is equal. Works on pieces of a stream too: the cache then holds each tile's
own cache, [tiles, ...].
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
  """Side of a tile and the least overlap of neighbours, both in latent pixels (8 of the video's).

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
  """First pixel of each tile along a side of `length`: evenly spread, the last tile ends with the
  side.
  """
  if length <= tiling.size:
    return [0]
  count = math.ceil((length - tiling.overlap) / (tiling.size - tiling.overlap))
  return [round(i * (length - tiling.size) / (count - 1)) for i in range(count)]


def ramp(length: int, seam: int, before: bool, after: bool) -> np.ndarray:
  """Weights along one side of a tile: rising over `seam` pixels after a neighbour before, falling
  to one after.
  """
  position = np.arange(length, dtype=np.float32)
  weight = np.ones(length, np.float32)
  if before:
    weight = np.minimum(weight, (position + 0.5) / seam)
  return np.minimum(weight, (length - position - 0.5) / seam) if after else weight


@dataclasses.dataclass(frozen=True)
class _Grid:
  """Where the tiles lie; everything in latent pixels."""

  rows: list[int]
  columns: list[int]
  height: int
  width: int

  def corners(self) -> list[tuple[int, int]]:
    return [(y, x) for y in self.rows for x in self.columns]


def _grid(height: int, width: int, tiling: Tiling) -> _Grid:
  return _Grid(
    starts(height, tiling), starts(width, tiling), min(height, tiling.size), min(width, tiling.size)
  )


def cut(video: jax.Array, tiling: Tiling, scale: int = 1) -> jax.Array:
  """[b f h w c] -> [tiles b f th tw c]; `scale` pixels of the array make one latent pixel."""
  grid = _grid(video.shape[2] // scale, video.shape[3] // scale, tiling)
  height, width = grid.height * scale, grid.width * scale
  corners = [(y * scale, x * scale) for y, x in grid.corners()]
  return jnp.stack([video[:, :, y : y + height, x : x + width] for y, x in corners])


def blend(tiles: jax.Array, height: int, width: int, tiling: Tiling, scale: int = 1) -> jax.Array:
  """[tiles b f th tw c] -> [b f h w c]: the inverse of `cut` for a frame of height x width latent
  pixels.
  """
  if tiles.shape[0] == 1:
    return tiles[0]
  grid, seam = _grid(height, width, tiling), tiling.overlap * scale
  total = jnp.zeros(
    (*tiles.shape[1:3], height * scale, width * scale, tiles.shape[-1]), tiles.dtype
  )
  weights = np.zeros((1, 1, height * scale, width * scale, 1), np.float32)
  for tile, (y, x) in zip(tiles, grid.corners(), strict=True):
    rows = ramp(tile.shape[2], seam, y > 0, y + grid.height < height)
    columns = ramp(tile.shape[3], seam, x > 0, x + grid.width < width)
    weight = np.outer(rows, columns)[None, None, :, :, None]
    there = np.s_[
      :, :, y * scale : y * scale + tile.shape[2], x * scale : x * scale + tile.shape[3]
    ]
    total = total.at[there].add(weight * tile)
    weights[there] += weight
  return total / weights


CodeChunk = Callable[..., tuple[jax.Array, PyTree]]


def _tiled(
  code: CodeChunk, params: Params, tiles: jax.Array, cache: PyTree, config
) -> tuple[jax.Array, PyTree]:
  if cache is not None and cache["conv_in"].shape[:1] != tiles.shape[:1]:
    raise UserError(
      f"VAE tiling: the cache belongs to {cache['conv_in'].shape[0]} tiles, the chunk is cut into "
      f"{tiles.shape[0]}."
      " Keep one tiling for the whole video."
    )
  # lax.map runs tile after tile: the memory of one tile's activations, however many there are.
  return jax.lax.map(lambda tile: code(params, tile[0], tile[1], config), (tiles, cache))


def encode_chunk(
  params: Params, video: vae.Pixels, cache: PyTree, config: vae.VAEConfig, tiling: Tiling
) -> tuple[vae.Latents, PyTree]:
  """`vae.encode_chunk` in tiles; the cache is for this tiling only."""
  vae.check_pixels(video.shape, cache, config)
  scale = config.spatial_factor
  tiles, cache = _tiled(vae.encode_chunk, params, cut(video, tiling, scale), cache, config)
  return blend(tiles, video.shape[2] // scale, video.shape[3] // scale, tiling), cache


def decode_chunk(
  params: Params, latents: vae.Latents, cache: PyTree, config: vae.VAEConfig, tiling: Tiling
) -> tuple[vae.Pixels, PyTree]:
  """`vae.decode_chunk` in tiles; the cache is for this tiling only."""
  tiles, cache = _tiled(vae.decode_chunk, params, cut(latents, tiling), cache, config)
  return blend(tiles, latents.shape[2], latents.shape[3], tiling, config.spatial_factor), cache


def encode(
  params: Params,
  video: vae.Pixels,
  config: vae.VAEConfig,
  tiling: Tiling,
  chunk: int | None = 1,
  unroll: bool = False,
) -> vae.Latents:
  """`vae.encode` in tiles: a whole tile's video after another, so that only one tile's cache is
  alive.
  """
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
  """`vae.decode` in tiles: a whole tile's video after another, so that only one tile's cache is
  alive.
  """
  tiles = jax.lax.map(
    lambda tile: vae.decode(params, tile, config, chunk, unroll), cut(latents, tiling)
  )
  return blend(tiles, latents.shape[2], latents.shape[3], tiling, config.spatial_factor)
