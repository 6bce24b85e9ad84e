"""FramePack's packed frames (arXiv 2504.12626) on the diffusion transformer of models.dit.

Groups of frames become one sequence of tokens, in the order in which they are given: a group by the
projection "packed_kP" takes P frames and P x P patches a token, one by "patch_embedding" is noisy
and gets a velocity. All tokens attend to each other. A group has a noise level of its own and frame
indices that may differ from clip to clip; one without a text hears none.

A packed projection begins as average pooling of the latents followed by the patch embedding
(`initial_projection`), so a network that knows no packing starts with what it would see of the
pooled frames. The last frame, row and column are repeated up to whole kernels (as published).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.models import rope
from hiar_jax.models.dit_layers import (
  KV,
  Shared,
  dense,
  embed_text,
  embed_time,
  place_features,
  project_out,
  stacked,
)
from hiar_jax.models.frames import PROJECTION, Frames, Out
from hiar_jax.types import Params

PREFIX = "packed_k"


def projection_of(pool: int) -> str:
  """Returns the name of the input projection of a kernel."""
  return f"{PREFIX}{pool}"


def pool_of(group: Frames) -> int:
  """Returns the pool of a group's projection; 0 for frames that are not packed.

  Raises UserError for a projection that is neither.
  """
  if group.projection == PROJECTION:
    return 0
  pool = group.projection.removeprefix(PREFIX)
  if not pool.isdigit() or group.projection == pool:
    raise UserError(
      f"projection {group.projection!r}: expected {PROJECTION!r}, or {PREFIX}P for packed frames"
    )
  return int(pool)


def initial_projection(patch_embedding: dict, pool: int, patch: tuple[int, int, int]) -> dict:
  """Returns {kernel, bias} of a packed projection: the patch embedding of latents averaged over
  pool^3.

  patch_embedding: kernel [ph*pw*c d], bias [d]. The kernel [pool*(pool*ph)*(pool*pw)*c d] repeats
  each of its taps `pool` times along every axis, divided by pool^3 (FramePack's published code).
  """
  kernel = patch_embedding["kernel"]
  _, ph, pw = patch
  taps = kernel.reshape(1, ph, pw, -1, kernel.shape[-1])
  for axis in range(3):
    taps = jnp.repeat(taps, pool, axis=axis)
  return {
    "kernel": taps.reshape(-1, kernel.shape[-1]) / pool**3,
    "bias": patch_embedding["bias"],
  }


def with_projections(config, params: Params) -> Params:
  """Returns parameters with the packed projections of config.packing alone: those that they lack
  are made, others left out.
  """
  names = {projection_of(pool): pool for pool in config.packing}
  missing = {name: pool for name, pool in names.items() if name not in params}
  embedding = params[PROJECTION]
  kept = {k: v for k, v in params.items() if k in names or not k.startswith(PREFIX)}
  return kept | {
    name: initial_projection(embedding, pool, config.patch) for name, pool in missing.items()
  }


def cut_kernels(x: jax.Array, kernel: tuple[int, int, int]) -> jax.Array:
  """Cuts latents [b f h w c] into kernels [b n product(kernel)*c], padded to whole ones."""
  x = rope.pad_to_kernel(x, kernel)
  b, f, h, w, c = x.shape
  kf, kh, kw = kernel
  x = x.reshape(b, f // kf, kf, h // kh, kh, w // kw, kw, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(b, -1, kf * kh * kw * c)


class PackedDiT(nn.Module):
  """DiT's parameters, and an input projection for each kernel of config.packing."""

  config: object  # models.dit.DiTConfig

  @nn.compact
  def __call__(self, groups: tuple[Frames, ...], text: jax.Array) -> tuple[jax.Array, KV, tuple]:
    """Returns (numbers of the noisy tokens' patches, K/V of all tokens, the groups' lengths).

    text: [b l d], of every group that hears one.
    """
    c = self.config
    # one module a projection: several groups may share one
    projections = {
      name: dense(c, c.dim, name) for name in dict.fromkeys(g.projection for g in groups)
    }
    place = nn.Dense(c.dim, dtype=c.dtype, name="place_embedding") if c.place_embedding else None
    parts = [_embed(c, group, projections[group.projection], place) for group in groups]
    lengths = tuple(tokens.shape[1] for tokens, _ in parts)
    cos = jnp.concatenate([turn[0] for _, turn in parts], axis=1)[:, None]
    sin = jnp.concatenate([turn[1] for _, turn in parts], axis=1)[:, None]
    sigma = jnp.stack([_level(group) for group in groups], axis=1)  # [b groups]
    time, modulation = embed_time(c, flow.timestep(sigma))
    deaf = [group.text is None for group in groups]
    in_front = sum(n for n, is_deaf in zip(lengths, deaf, strict=True) if is_deaf)
    if sorted(deaf, reverse=True) != deaf:
      raise UserError("packed frames without a text stand before those with one")
    shared = Shared(modulation, embed_text(c, text), cos, sin, None, lengths, in_front)
    tokens = jnp.concatenate([tokens for tokens, _ in parts], axis=1)[:, None]
    tokens, own = stacked(c)(tokens, None, shared)
    noisy = sum(n for n, group in zip(lengths, groups, strict=True) if pool_of(group))
    return project_out(self, c, tokens[:, :, noisy:], time[:, -1:]), own, lengths


def apply(config, params, groups: tuple[Frames, ...], texts) -> Out:
  """models.frames.Network.apply for packed frames and the noisy section, the last group."""
  _check(config, groups)
  heard = [group.text for group in groups if group.text is not None]
  patches, own, lengths = PackedDiT(config).apply({"params": params}, groups, texts[heard[0]])
  noisy = groups[-1].x
  b, k, h, w, c = noisy.shape
  _, ph, pw = config.patch
  velocity = patches.reshape(b, k, h // ph, w // pw, ph, pw, c).transpose(0, 1, 2, 4, 3, 5, 6)
  ends = np.cumsum(lengths)
  kv = tuple(
    jax.tree.map(lambda leaf: leaf[:, :, :, end - n : end], own)  # noqa: B023
    for end, n in zip(ends, lengths, strict=True)
  )
  velocities = (None,) * (len(groups) - 1) + (velocity.reshape(noisy.shape).astype(jnp.float32),)
  return Out(velocities, kv)


def _embed(c, group: Frames, projection, place) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns (tokens [b n dim] of a group, their rotation: cos and sin [b n 1 pairs])."""
  b, k, h, w, _ = group.x.shape
  (_, ph, pw), pool = c.patch, pool_of(group) or 1
  x = cut_kernels(jnp.asarray(group.x).astype(c.dtype), (pool, pool * ph, pool * pw))
  tokens = projection(x)
  positions = jnp.asarray(group.positions, jnp.int32)
  rows, columns = h // ph, w // pw
  if place is not None:
    features = place_features(jnp.broadcast_to(positions, (b, k)), rows, columns, c.places)
    grid = features.reshape(b, k, rows, columns, -1)
    tokens = tokens + place(jax.vmap(lambda x: rope.pool_patches(x, pool))(grid))
  turns = rope.pooled_rotation(positions, rows, columns, c.head_dim, pool)
  return tokens, tuple(jnp.broadcast_to(turn, (b, *turn.shape[1:])) for turn in turns)


def _level(group: Frames) -> jax.Array:
  """Returns the noise level [b] of a group, one for all of its frames."""
  sigma = jnp.asarray(group.sigma, jnp.float32)
  if sigma.ndim > 1:
    raise UserError("packed frames: one noise level a group, not one a frame")
  return jnp.broadcast_to(sigma, group.x.shape[:1])


def _check(config, groups: tuple[Frames, ...]) -> None:
  """Raises UserError for groups that are not packed frames before one noisy section."""
  *packed, noisy = groups
  if pool_of(noisy) or not all(pool_of(group) for group in packed) or noisy.text is None:
    raise UserError("packed frames stand before the one group that is noisy and hears a text")
  wanted = {pool_of(group) for group in packed}
  if missing := wanted - set(config.packing):
    raise UserError(
      f"kernel k{min(missing)}: the model has projections for "
      f"{', '.join(f'k{pool}' for pool in config.packing) or 'no packed frames'}"
    )
  others = {(read.group, read.past) for group in groups for read in group.reads}
  if any(group.exists is not None for group in groups) or any(p is not None for _, p in others):
    raise UserError("packed frames attend to all of their forward, and to no past")
