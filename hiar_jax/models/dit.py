"""The diffusion transformer of Wan2.1 (arXiv 2503.20314, weights Wan-AI/Wan2.1-T2V-1.3B and 14B).

Deviations: noise levels, masks and K/V are per frame; frame positions have no upper limit
(models.rope); learned modulations start with open gates; a place embedding is optional. None
changes the output for published weights.

Tokens of the latent frames attend to each other and, by cross-attention, to the text; the noise
level modulates every layer and may differ from frame to frame. Which frames see which is an
argument (models.frames): one set of parameters serves with full, block-causal and cached attention.

K/V come out of every call and go in as `past`; nothing is hidden in a mutable collection. Residual
stream and matrix products run in `dtype`; norms, modulation, rotary angles, softmax and the output
are float32.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.attention import attend
from hiar_jax.attention.remat import POLICIES
from hiar_jax.attention.views import Views
from hiar_jax.errors import UserError, above, at_least, one_of
from hiar_jax.models import dit_packed, rope
from hiar_jax.models.dit_layers import (
  KV,
  SHARDING_RULES,
  Shared,
  dense,
  embed_text,
  embed_time,
  place_features,
  project_out,
  stacked,
)
from hiar_jax.models.frames import Frames, Out, frame_levels, frame_views
from hiar_jax.packing.schedule import POOLS
from hiar_jax.parallel.mesh import Splits
from hiar_jax.types import DTYPES, Params, Positions, Sigma, Text, Texts, Video, typed

REMATS = ("none", *POLICIES)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Sizes under Wan2.1's names; the defaults are those of the 1.3B model.

  14B: dim 5120, ffn_dim 13824, num_heads 40, num_layers 40.
  remat: what the backward pass recomputes: nothing (none), or all of a layer (full) but what
    attention.remat keeps by its name: `dots`, `attention`, `offload`.
  unroll: layers per iteration of the loop over layers; more run a little faster, compile slower.
  merge_tokens: dense layers take the tokens of all frames and clips as the rows of one matrix.
    Numerically the same; on a CPU a training step is 14 % shorter (XLA transposes the gradients of
    a product with several leading axes, and here sums up the residual stream once more to do so).
    Not where the tokens of a clip are split over devices: such axes cannot be merged without
    gathering them.
  place_embedding: adds to each token a learned function of its row, column and frame. Wan2.1 has
    none: with rotations alone a token can infer its position only from the borders, which small
    grids and short trainings do not teach.
  places: (n, period) of the place embedding's frames: the first n of a video are distinct, later
    ones repeat with the period, so a video may have any length.
  guided: adds the embedding of a guidance scale to that of the noise level (dit_layers.embed_time),
    for distilled guidance, in forwards of packed frames that are given one.
  """

  dim: int = 1536
  ffn_dim: int = 8960
  num_heads: int = 12
  num_layers: int = 30
  patch: tuple[int, int, int] = (1, 2, 2)
  channels: int = 16
  text_dim: int = 4096
  freq_dim: int = 256
  eps: float = 1e-6
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  unroll: int = 1
  merge_tokens: bool = False
  place_embedding: bool = False
  places: tuple[int, int] = (1_024, 1)
  packing: tuple[int, ...] = dataclasses.field(default=(), metadata={"since": "2026-11"})
  guided: bool = dataclasses.field(default=False, metadata={"since": "2026-11"})
  kind = "dit"
  # the fields that decide the names and shapes of parameters
  sizes = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "patch",
    "channels",
    "text_dim",
    "freq_dim",
    "place_embedding",
    "packing",
    "guided",
  )
  free = ("attention", "remat", "unroll", "merge_tokens")

  def __post_init__(self):
    at_least(
      1, dim=self.dim, ffn_dim=self.ffn_dim, num_heads=self.num_heads, num_layers=self.num_layers
    )
    at_least(1, unroll=self.unroll)
    above(0, eps=self.eps)
    one_of(DTYPES, dtype=self.dtype)
    if self.freq_dim < 2 or self.freq_dim % 2:
      raise UserError(f"freq_dim = {self.freq_dim}: expected an even number, at least 2")
    if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
      raise UserError(
        f"dim = {self.dim} must split into num_heads = {self.num_heads} heads of even width"
      )
    if self.patch[0] != 1:
      raise UserError(
        f"patch = {self.patch}: the first entry must be 1, frames have levels of their own"
      )
    one_of(REMATS, remat=self.remat)
    at_least(1, places=sum(self.places), period=self.places[1])
    one_of(attend.IMPLEMENTATIONS, attention=self.attention)
    if any(pool not in POOLS for pool in self.packing):
      raise UserError(f"packing = {self.packing}: expected kernels of {POOLS}")

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  def tokens(self, height: int, width: int) -> int:
    """Tokens of one latent frame."""
    return (height // self.patch[1]) * (width // self.patch[2])

  # models.frames.Network

  sharding_rules = SHARDING_RULES

  @property
  def reads_start(self) -> bool:
    return self.place_embedding

  def init(self, key: jax.Array) -> Params:
    _, ph, pw = self.patch
    # No parameter depends on the attention kernel, which may be unavailable here, or on sizes: one
    # patch.
    portable = dataclasses.replace(self, attention="xla")
    x, text = jnp.zeros((1, 1, ph, pw, self.channels)), jnp.zeros((1, 1, self.text_dim))
    start = x, jnp.zeros((1, 1)), text, jnp.zeros(1, jnp.int32)
    return self.with_projections(DiT(portable).init(key, *start)["params"])

  def matrix_axes(self, path: tuple[str, ...], ndim: int) -> tuple[int, int] | None:
    # the kernels of the layers, stacked as [layers, in, out] by the scan over layers; embeddings,
    # head, norms and biases go by AdamW, as Muon's author advises
    return (1, 2) if ndim == 3 and path[0] == "layers" and path[-1] == "kernel" else None

  def unavailable_on(self, platform: str) -> str:
    why = attend.refused(self.attention, platform, self.dtype, self.head_dim)
    return f"attention = {why}" if why else ""

  def empty_kv(self, frames: int, batch: int, height: int, width: int) -> KV:
    tokens = self.tokens(height, width)
    shape = (self.num_layers, batch, frames, tokens, self.num_heads, self.head_dim)
    zeros = jnp.zeros(shape, self.dtype)
    return KV(zeros, zeros)

  def apply(
    self, params: Params, groups: tuple[Frames, ...], texts, past=(), start=None, guidance=None
  ) -> Out:
    if any(dit_packed.pool_of(g) or jnp.ndim(g.positions) == 2 for g in groups):
      return dit_packed.apply(self, params, groups, texts, guidance)
    if guidance is not None:
      raise UserError("DiT: a guidance scale is an input of packed models alone")
    if any(g.packed for g in groups):
      return dit_packed.apply_with_history(self, params, groups, texts, past, start)
    _check_groups(groups, texts.shape[0])
    sizes = [g.x.shape[1] for g in groups]
    heard = [g.text for g in groups]
    if len(set(heard)) == 1:  # one text for all frames
      text = texts[heard[0]]
    else:  # one for each group, all of a size
      text = jnp.stack([texts[i] for i in heard], axis=1)
    velocity, kv = DiT(self).apply(
      {"params": params},
      jnp.concatenate([jnp.asarray(g.x) for g in groups], axis=1),
      flow.timestep(jnp.concatenate([frame_levels(g.sigma, g.x) for g in groups], axis=1)),
      text,
      jnp.concatenate([jnp.asarray(g.positions, jnp.int32) for g in groups]),
      frame_views(groups, tuple(kv.k.shape[2] for kv in past)),
      jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *past) if past else None,
      start,
    )
    ends = np.cumsum(sizes)
    return Out(
      tuple(velocity[:, end - k : end] for end, k in zip(ends, sizes, strict=True)),
      tuple(kv.take(end - k, end) for end, k in zip(ends, sizes, strict=True)),
    )

  def splits(self, height: int) -> Splits:
    heads, hidden, rows = self.num_heads, self.ffn_dim, height // self.patch[1]
    splits = {
      ("tensor",): (math.gcd(heads, hidden), f"{heads} heads and {hidden} hidden units"),
      ("sequence",): (math.gcd(heads, rows), f"{heads} heads and {rows} rows of tokens"),
      ("tensor", "sequence"): (heads, f"the {heads} heads"),
    }
    if self.attention not in attend.ON_RING:
      name = repr(self.attention)
      what = f"the frames, which attention = {name} takes whole; use 'auto' or 'blockwise'"
      splits[("ring",)] = 1, what
    elif self.packing:
      splits[("ring",)] = 1, "packed frames, whose tokens are of all sizes; use mesh.sequence"
    return splits

  def packed(self, pools: tuple[int, ...], guided: bool = False) -> "DiTConfig":
    return dataclasses.replace(self, packing=pools, guided=guided)

  def with_projections(self, params: Params) -> Params:
    return dit_packed.with_projections(self, params)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The fields of a DiTConfig that an experiment chooses; the others follow from codec and text."""

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  patch: tuple[int, int, int] = (1, 1, 1)
  freq_dim: int = 256
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  unroll: int = 1
  merge_tokens: bool = False
  place_embedding: bool = False

  def network(self, channels: int, text_dim: int, places: tuple[int, int]) -> DiTConfig:
    """Returns the network; channels: of latents, text_dim: width of the text."""
    return DiTConfig(
      **dataclasses.asdict(self), channels=channels, text_dim=text_dim, places=places
    )


def _check_groups(groups: tuple[Frames, ...], texts: int) -> None:
  """Raises UserError for what a group may ask of other networks, or a text that is not there."""
  for group in groups:
    if group.text is None:
      raise UserError("DiT: without packed frames all groups hear a text")
    if not 0 <= group.text < texts:
      raise UserError(f"DiT: a group hears text {group.text}, of which there are {texts}")
  if len({g.text for g in groups}) > 1 and len({g.x.shape[1] for g in groups}) > 1:
    raise UserError("DiT: groups with texts of their own must have as many frames each")


class DiT(nn.Module):
  """Velocity of noisy latents, and the K/V of their frames; see the module's docstring."""

  config: DiTConfig

  @nn.compact
  @typed
  def __call__(
    self,
    x: Video,
    timestep: Sigma,
    text: Text | Texts,
    positions: Positions,
    views: Views = (),
    past: KV | None = None,
    start: jax.Array | None = None,
  ) -> tuple[jax.Array, KV]:
    """Returns the velocity [b f h w c] of noisy latents x, float32, and the K/V of x's frames.

    timestep: per frame, in [0, 1000]. positions: frame indices.
    views: what the frames see of [past | own], () = all.
    text: one for all frames, or one for each of g equal groups of them.
    start: [b], frames of its video before each clip; for the place embedding alone (rotations see
      differences).
    """
    c = self.config
    b, f, h, w, _ = x.shape
    _, ph, pw = c.patch
    rows, columns = h // ph, w // pw
    # patches: [b f rows ph columns pw c] -> [b f rows columns ph pw c] -> [b f t ph*pw*c]
    tokens = x.reshape(b, f, rows, ph, columns, pw, c.channels).transpose(0, 1, 2, 4, 3, 5, 6)
    tokens = dense(c, c.dim, "patch_embedding")(
      tokens.reshape(b, f, rows * columns, -1).astype(c.dtype)
    )

    if c.place_embedding:
      frames = positions[None] + (0 if start is None else start[:, None])
      tokens = tokens + dense(c, c.dim, "place_embedding")(
        place_features(frames, rows, columns, c.places)
      )

    text = embed_text(c, text)
    time, modulation = embed_time(c, timestep)
    cos, sin = rope.rotation(positions, rows, columns, c.head_dim)
    tokens, own = stacked(c)(tokens, past, Shared(modulation, text, cos, sin, views))
    tokens = project_out(self, c, tokens, time)
    # the inverse of the patches above
    velocity = tokens.reshape(b, f, rows, columns, ph, pw, c.channels).transpose(
      0, 1, 2, 4, 3, 5, 6
    )
    return velocity.reshape(b, f, h, w, c.channels).astype(jnp.float32), own
