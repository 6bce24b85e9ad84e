"""FramePack's packed frames (arXiv 2504.12626) on the diffusion transformer of models.dit.

Groups of frames become one sequence of tokens, in the order in which they are given: a group by the
projection "packed_kP" takes P frames and P x P patches a token, one by "patch_embedding" is noisy
and gets a velocity. A group has a noise level of its own and frame indices that may differ from
clip to clip; one without a text hears none.

    apply               packed groups, then one noisy section: all tokens attend to each other
    apply_with_history  noisy groups with what they read of each other and of a past, as in
                        models.dit, and packed frames that each sees alone (Frames.packed)

A packed projection begins as average pooling of the latents followed by the patch embedding
(`initial_projection`), so a network that knows no packing starts with what it would see of the
pooled frames. The last frame, row and column are repeated up to whole kernels (as published).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.attention.views import Views, view
from hiar_jax.errors import UserError
from hiar_jax.models import rope
from hiar_jax.models.dit_layers import (
  GUIDANCE,
  KV,
  Shared,
  dense,
  embed_text,
  embed_time,
  place_features,
  project_out,
  stacked,
)
from hiar_jax.models.frames import PROJECTION, Frames, Out, seen_frames
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
  """Returns parameters with the packed projections of config.packing alone, and with a guidance
  embedding where config is guided: what they lack is made, what config has not is left out.

  The guidance embedding starts as that of time with zeros as its last layer: it changes nothing.
  """
  names = {projection_of(pool): pool for pool in config.packing}
  missing = {name: pool for name, pool in names.items() if name not in params}
  embedding = params[PROJECTION]
  kept = {k: v for k, v in params.items() if k in names or not k.startswith(PREFIX)}
  kept |= {
    name: initial_projection(embedding, pool, config.patch) for name, pool in missing.items()
  }
  if not config.guided:
    return {name: part for name, part in kept.items() if name not in GUIDANCE}
  first, last = GUIDANCE
  zeros = jax.tree.map(jnp.zeros_like, params["time_embedding_out"])
  # a copy: buffers of a training state are donated, and none may lie in it twice
  return {first: jax.tree.map(jnp.copy, params["time_embedding_in"]), last: zeros} | kept


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
  def __call__(
    self,
    groups: tuple[Frames, ...],
    text: jax.Array,
    views: Views = (),
    past: KV | None = None,
    start=None,
    guidance=None,
  ) -> tuple[jax.Array, KV, tuple]:
    """Returns (numbers of the noisy tokens' patches, K/V of all tokens, the groups' lengths).

    groups: packed ones, then noisy ones. text: [b l d] of every group that hears one, or [b g l d]
    of g such groups. views: of tokens, over [past | own]. past: K/V of tokens as one frame. start:
    [b], frames before each clip, for the place embedding. guidance: scales [b], or None.
    """
    c = self.config
    # one module a projection: several groups may share one
    projections = {
      name: dense(c, c.dim, name) for name in dict.fromkeys(g.projection for g in groups)
    }
    place = nn.Dense(c.dim, dtype=c.dtype, name="place_embedding") if c.place_embedding else None
    parts = [_embed(c, group, projections[group.projection], place, start) for group in groups]
    lengths = tuple(tokens.shape[1] for tokens, _ in parts)
    cos = jnp.concatenate([turn[0] for _, turn in parts], axis=1)[:, None]
    sin = jnp.concatenate([turn[1] for _, turn in parts], axis=1)[:, None]
    sigma = jnp.concatenate([_levels(group) for group in groups], axis=1)  # [b rows]
    time, modulation = embed_time(c, flow.timestep(sigma), guidance)
    # a noisy group may have a level for each frame
    rows = [_levels(group).shape[1] for group in groups]
    spans = tuple(n // k for n, k in zip(lengths, rows, strict=True) for _ in range(k))
    deaf = [group.text is None for group in groups]
    in_front = sum(n for n, is_deaf in zip(lengths, deaf, strict=True) if is_deaf)
    if sorted(deaf, reverse=True) != deaf:
      raise UserError("packed frames without a text stand before those with one")
    shared = Shared(modulation, embed_text(c, text), cos, sin, views, spans, in_front)
    tokens = jnp.concatenate([tokens for tokens, _ in parts], axis=1)[:, None]
    tokens, own = stacked(c)(tokens, past, shared)
    packed = [bool(pool_of(group)) for group in groups].count(True)
    first, row = sum(lengths[:packed]), sum(rows[:packed])
    spans = spans[row:] if len(spans) > row + 1 else ()
    return project_out(self, c, tokens[:, :, first:], time[:, row:], spans), own, lengths


def apply(config, params, groups: tuple[Frames, ...], texts, guidance=None) -> Out:
  """models.frames.Network.apply for packed frames and the noisy section, the last group."""
  _check(config, groups)
  if guidance is not None and not config.guided:
    raise UserError("a guidance scale was given to a model without distilled guidance")
  heard = [group.text for group in groups if group.text is not None]
  return _run(config, params, groups, texts[heard[0]], guidance=guidance)


def apply_with_history(
  config, params, groups: tuple[Frames, ...], texts, past: tuple[KV, ...], start
) -> Out:
  """models.frames.Network.apply for noisy groups with packed frames of their own."""
  history = tuple(packed for group in groups for packed in group.packed)
  _check_kernels(config, history)
  if any(packed.text is not None for packed in history):
    raise UserError("packed frames beside a past hear no text")
  heard = [group.text for group in groups]
  text = texts[heard[0]]
  if len(set(heard)) > 1:  # one for each group, all of a size
    text = jnp.stack([texts[i] for i in heard], axis=1)
  frames = tuple(kv.k.shape[2] for kv in past)
  merged = None
  if past:  # one frame of all tokens
    merged = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *past)
    merged = jax.tree.map(lambda x: x.reshape(*x.shape[:2], 1, -1, *x.shape[4:]), merged)
  views = token_views(groups, frames, config.patch)
  out = _run(config, params, (*history, *groups), text, views, merged, start)
  return Out(out.velocity[len(history) :], out.kv[len(history) :])


def token_views(
  groups: tuple[Frames, ...], past_frames: tuple[int, ...], patch: tuple[int, int, int]
) -> Views:
  """Returns who sees whom, by tokens: [history | groups] of [past | history | groups], the history
  being the packed frames of all groups in their order. Those of a group see each other alone, and
  are seen by the group alone.
  """
  h, w = groups[0].x.shape[2] // patch[1], groups[0].x.shape[3] // patch[2]
  there = [[_tokens_there(packed, h, w) for packed in group.packed] for group in groups]
  none = [[np.zeros(len(part), bool) for part in parts] for parts in there]

  def of(j: int) -> list:  # group j's own packed frames, among those of all
    return [part for i in range(len(groups)) for part in (there if i == j else none)[i]]

  past = [np.zeros(p * h * w, bool) for p in past_frames]
  others = [np.zeros(g.x.shape[1] * h * w, bool) for g in groups]
  views, first = [], 0
  for j, parts in enumerate(there):
    if n := sum(map(len, parts)):
      views.append(view((first, first + n), [*past, *of(j), *others]))
      first += n
  for j, sources in enumerate(seen_frames(groups, past_frames)):
    tokens = [(np if isinstance(seen, np.ndarray) else jnp).repeat(seen, h * w) for seen in sources]
    n, count = groups[j].x.shape[1] * h * w, len(past_frames)
    views.append(view((first, first + n), [*tokens[:count], *of(j), *tokens[count:]]))
    first += n
  return tuple(views)


def _tokens_there(packed: Frames, rows: int, columns: int):
  """Returns which tokens of packed frames hold a frame that exists, [n]; numpy's where known."""
  pool, k = pool_of(packed), packed.x.shape[1]
  there = np.ones(k, bool) if packed.exists is None else packed.exists
  module = np if isinstance(there, np.ndarray) else jnp
  there = module.pad(there, (0, -k % pool)).reshape(-1, pool).any(axis=1)
  return module.repeat(there, -(-rows // pool) * -(-columns // pool))


def _run(
  config, params, groups, text, views: Views = (), past: KV | None = None, start=None, guidance=None
) -> Out:
  """Runs PackedDiT: velocities of the noisy groups, None of packed ones, and the K/V of each."""
  patches, own, lengths = PackedDiT(config).apply(
    {"params": params}, groups, text, views, past, start, guidance
  )
  ends = np.cumsum(lengths)
  first = ends[-1] - patches.shape[2]  # of the noisy tokens
  velocity, kv = [], []
  for group, end, n in zip(groups, ends, lengths, strict=True):
    part = jax.tree.map(lambda leaf: leaf[:, :, :, end - n : end], own)  # noqa: B023
    if pool_of(group):
      velocity.append(None)
    else:
      b, k, h, w, c = group.x.shape
      _, ph, pw = config.patch
      x = patches[:, :, end - n - first : end - first].reshape(b, k, h // ph, w // pw, ph, pw, c)
      velocity.append(x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(group.x.shape).astype(jnp.float32))
      part = jax.tree.map(lambda x: x.reshape(*x.shape[:2], k, -1, *x.shape[4:]), part)  # noqa: B023
    kv.append(part)
  return Out(tuple(velocity), tuple(kv))


def _embed(
  c, group: Frames, projection, place, start
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns (tokens [b n dim] of a group, their rotation: cos and sin [b n 1 pairs])."""
  b, k, h, w, _ = group.x.shape
  (_, ph, pw), pool = c.patch, pool_of(group) or 1
  x = cut_kernels(jnp.asarray(group.x).astype(c.dtype), (pool, pool * ph, pool * pw))
  tokens = projection(x)
  positions = jnp.asarray(group.positions, jnp.int32)
  rows, columns = h // ph, w // pw
  if place is not None:
    frames = jnp.broadcast_to(positions, (b, k)) + (0 if start is None else start[:, None])
    features = place_features(frames, rows, columns, c.places)
    grid = features.reshape(b, k, rows, columns, -1)
    tokens = tokens + place(jax.vmap(lambda x: rope.pool_patches(x, pool))(grid))
  turns = rope.pooled_rotation(positions, rows, columns, c.head_dim, pool)
  return tokens, tuple(jnp.broadcast_to(turn, (b, *turn.shape[1:])) for turn in turns)


def _levels(group: Frames) -> jax.Array:
  """Returns the noise level of a group [b 1], or of each frame of a noisy one [b k]."""
  sigma = jnp.asarray(group.sigma, jnp.float32)
  if sigma.ndim > 1 and pool_of(group):
    raise UserError("packed frames: one noise level a group, not one a frame")
  return sigma if sigma.ndim > 1 else jnp.broadcast_to(sigma, group.x.shape[:1])[:, None]


def _check(config, groups: tuple[Frames, ...]) -> None:
  """Raises UserError for groups that are not packed frames before one noisy section."""
  *packed, noisy = groups
  if pool_of(noisy) or not all(pool_of(group) for group in packed) or noisy.text is None:
    raise UserError("packed frames stand before the one group that is noisy and hears a text")
  _check_kernels(config, packed)
  others = {(read.group, read.past) for group in groups for read in group.reads}
  if any(group.exists is not None for group in groups) or any(p is not None for _, p in others):
    raise UserError("packed frames attend to all of their forward, and to no past")


def _check_kernels(config, packed) -> None:
  """Raises UserError for packed groups under a kernel that the model has no projection for."""
  if missing := {pool_of(group) for group in packed} - set(config.packing):
    raise UserError(
      f"kernel k{min(missing)}: the model has projections for "
      f"{', '.join(f'k{pool}' for pool in config.packing) or 'no packed frames'}"
    )
