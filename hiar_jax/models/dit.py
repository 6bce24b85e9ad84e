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
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.errors import UserError, at_least
from hiar_jax.models import attention, rope
from hiar_jax.models.dit_layers import (
  RMSNorm,
  along_last_axis,
  layer_norm,
  place_features,
  time_features,
)
from hiar_jax.models.frames import PROJECTION, Frames, Out, frame_mask
from hiar_jax.types import FrameMask, Params, Positions, Sigma, Text, Texts, Video, typed

REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Sizes under Wan2.1's names; the defaults are those of the 1.3B model.

  14B: dim 5120, ffn_dim 13824, num_heads 40, num_layers 40.
  remat: what the backward pass recomputes: nothing, all but matrix products (dots), or whole layers
    (full).
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
  attention: str = "xla"
  unroll: int = 1
  merge_tokens: bool = False
  place_embedding: bool = False
  places: tuple[int, int] = (1_024, 1)

  def __post_init__(self):
    at_least(
      1, dim=self.dim, ffn_dim=self.ffn_dim, num_heads=self.num_heads, num_layers=self.num_layers
    )
    if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
      raise UserError(
        f"dim = {self.dim} must split into num_heads = {self.num_heads} heads of even width"
      )
    if self.patch[0] != 1:
      raise UserError(
        f"patch = {self.patch}: the first entry must be 1, frames have levels of their own"
      )
    if self.remat not in REMATS:
      raise UserError(f"remat = {self.remat!r}: expected one of {', '.join(REMATS)}")
    at_least(1, places=sum(self.places), period=self.places[1])
    if self.attention not in attention.IMPLEMENTATIONS:
      raise UserError(
        f"attention = {self.attention!r}: expected one of {', '.join(attention.IMPLEMENTATIONS)}"
      )

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  def tokens(self, height: int, width: int) -> int:
    """Tokens of one latent frame."""
    return (height // self.patch[1]) * (width // self.patch[2])

  # models.frames.Network

  def empty_kv(self, frames: int, batch: int, height: int, width: int) -> "KV":
    shape = (
      self.num_layers,
      batch,
      frames,
      self.tokens(height, width),
      self.num_heads,
      self.head_dim,
    )
    zeros = jnp.zeros(shape, self.dtype)
    return KV(zeros, zeros)

  def apply(self, params: Params, groups: tuple[Frames, ...], texts, past=(), start=None) -> Out:
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
      flow.timestep(jnp.concatenate([_levels(g) for g in groups], axis=1)),
      text,
      jnp.concatenate([jnp.asarray(g.positions, jnp.int32) for g in groups]),
      frame_mask(groups, tuple(kv.k.shape[2] for kv in past)),
      jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *past) if past else None,
      start,
    )
    ends = np.cumsum(sizes)
    return Out(
      tuple(velocity[:, end - k : end] for end, k in zip(ends, sizes, strict=True)),
      tuple(kv.take(end - k, end) for end, k in zip(ends, sizes, strict=True)),
    )


def _check_groups(groups: tuple[Frames, ...], texts: int) -> None:
  """Raises UserError for what a group may ask of other networks, or a text that is not there."""
  for group in groups:
    if group.projection != PROJECTION or group.text is None or jnp.ndim(group.positions) != 1:
      raise UserError(
        "DiT: packed frames, groups without a text and frame indices per example are not supported"
      )
    if not 0 <= group.text < texts:
      raise UserError(f"DiT: a group hears text {group.text}, of which there are {texts}")
  if len({g.text for g in groups}) > 1 and len({g.x.shape[1] for g in groups}) > 1:
    raise UserError("DiT: groups with texts of their own must have as many frames each")


def _levels(group: Frames) -> jax.Array:
  """Returns the noise level of each frame [b k]."""
  sigma = jnp.asarray(group.sigma, jnp.float32)
  sigma = sigma[:, None] if sigma.ndim == 1 else sigma
  b_k = group.x.shape[:2]
  return jnp.broadcast_to(sigma, b_k) if sigma.ndim else jnp.full(b_k, sigma)


@flax.struct.dataclass
class KV:
  """Keys (rotated) and values of frames: each [num_layers b f t a d]; see models.frames.KV."""

  k: jax.Array
  v: jax.Array

  def put(self, slots: jax.Array, new: "KV") -> "KV":
    def write(old, leaf):
      return old.at[:, :, slots].set(leaf.astype(old.dtype), mode="drop")

    return jax.tree.map(write, self, new)

  def take(self, first: int, end: int) -> "KV":
    return jax.tree.map(lambda leaf: leaf[:, :, first:end], self)

  def moved(self, distance: jax.Array) -> "KV":
    # keys keep their rotation to their true positions in the cache, and each use rotates a copy on:
    # none is rotated twice, so rounding does not accumulate; values hold no position
    return KV(rope.move(self.k, distance), self.v)


@flax.struct.dataclass
class Shared:
  """The inputs that all layers share."""

  modulation: jax.Array  # [b f 6 dim]
  text: jax.Array  # [b l dim] or [b g l dim]
  cos: jax.Array  # [f t 1 pairs]
  sin: jax.Array  # [f t 1 pairs]
  mask: jax.Array | None  # [f p+f]


def _dense(config: DiTConfig, features: int, name: str | None = None, **kwargs) -> nn.Dense:
  kwargs.setdefault("kernel_init", nn.initializers.xavier_uniform())
  return nn.Dense(
    features,
    dtype=config.dtype,
    name=name,
    dot_general=_merged_product if config.merge_tokens else None,
    **kwargs,
  )


def _merged_product(x: jax.Array, kernel: jax.Array, dimensions, **kwargs) -> jax.Array:
  """Returns x [... in] @ kernel [in out], with all leading axes of x merged for the product."""
  del dimensions  # nn.Dense always contracts x's last axis with the kernel's first
  rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs)
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


class Attention(nn.Module):
  """Projections around attention: self-attention over frames, or cross-attention to text."""

  config: DiTConfig

  def setup(self):
    c = self.config
    self.q, self.k, self.v, self.o = (_dense(c, c.dim) for _ in range(4))
    self.norm_q, self.norm_k = RMSNorm(c.eps), RMSNorm(c.eps)

  def heads(self, x):  # [... dim] -> [... a d]
    return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

  def to_frames(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    """Attends x [b f t dim] to [past | x]; returns x's shape and x's K/V, each [b f t a d]."""
    q = self.heads(self.norm_q(self.q(x)))
    k = self.heads(self.norm_k(self.k(x)))
    v = self.heads(self.v(x))
    # keys are cached as rotated here, at their true positions; only a relative sink is moved on
    q, k = rope.apply(q, shared.cos, shared.sin), rope.apply(k, shared.cos, shared.sin)
    own = KV(k, v)
    if past is not None:  # along the axis of frames, past first, as the mask's columns
      k, v = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in ((past.k, k), (past.v, v))
      )
    y = attention.attend(q, k, v, shared.mask, self.config.attention)
    return self.o(y.reshape(x.shape)), own

  def to_text(self, x, text) -> jax.Array:
    """Attends x [b f t dim] to text [b l dim] or [b g l dim]; returns x's shape."""
    q = self.heads(self.norm_q(self.q(x)))
    k = self.heads(self.norm_k(self.k(text)))
    v = self.heads(self.v(text))
    return self.o(attention.attend_text(q, k, v).reshape(x.shape))


class Layer(nn.Module):
  """Self-attention, cross-attention and MLP; the noise level modulates and gates first and last."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    c = self.config
    # a learned offset per layer to the modulation of the noise level: [1 1 6 dim] + [b f 6 dim]
    modulation = self.param("modulation", _modulation_init, (1, 6, c.dim))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulators(
      shared.modulation + modulation[:, None]
    )

    # float32 for norm, modulation and residual sum; c.dtype for what the layers take and carry
    y = (layer_norm(x, c.eps) * (1 + scale_a) + shift_a).astype(c.dtype)
    y, own = Attention(c, name="self_attention").to_frames(y, past, shared)
    x = (x + y * gate_a).astype(c.dtype)

    # cross-attention is neither modulated nor gated (Wan2.1); its norm has a scale and a bias
    norm_text = self.param(
      "norm_text", lambda _, width: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}, c.dim
    )
    y = (
      layer_norm(x, c.eps) * along_last_axis(norm_text["scale"], x)
      + along_last_axis(norm_text["bias"], x)
    ).astype(c.dtype)
    x = x + Attention(c, name="text_attention").to_text(y, shared.text)

    y = (layer_norm(x, c.eps) * (1 + scale_m) + shift_m).astype(c.dtype)
    y = _dense(c, c.dim, "mlp_out")(nn.gelu(_dense(c, c.ffn_dim, "mlp_in")(y), approximate=True))
    x = (x + y * gate_m).astype(c.dtype)
    return x, own


def _modulation_init(key, shape):
  """Draws Wan2.1's normal init plus 1 on the gates: closed gates cost the first 1,000 updates."""
  # rows: shift, scale, gate of self-attention; shift, scale, gate of the MLP
  gates = jnp.asarray([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).reshape(1, 6, 1)
  return gates + jax.random.normal(key, shape) * shape[-1] ** -0.5


def _modulators(table: jax.Array) -> list[jax.Array]:
  """Splits [b f m dim] into m float32 arrays [b f 1 dim] that broadcast over a frame's tokens."""
  return jnp.split(table.astype(jnp.float32), table.shape[-2], axis=-2)


def _layers(config: DiTConfig):
  """Returns all layers as one scanned module: parameters and K/V get a leading layer axis."""
  layer = Layer
  if config.remat != "none":
    # "dots" keeps the products with weights; those of attention have batch dimensions
    policy = (
      jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    )
    # prevent_cse is for code outside of scans; inside, it only costs
    layer = nn.remat(Layer, policy=policy, prevent_cse=False)
  # carry: x; scanned over: the parameters and `past`; `shared` is the same for every layer
  return nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
    out_axes=0,
    length=config.num_layers,
    unroll=config.unroll,
  )(config, name="layers")


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
    mask: FrameMask | None = None,
    past: KV | None = None,
    start: jax.Array | None = None,
  ) -> tuple[jax.Array, KV]:
    """Returns the velocity [b f h w c] of noisy latents x, float32, and the K/V of x's frames.

    timestep: per frame, in [0, 1000]. positions: frame indices.
    mask: [f, p + f] over [past | own] frames, None = all.
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
    tokens = _dense(c, c.dim, "patch_embedding")(
      tokens.reshape(b, f, rows * columns, -1).astype(c.dtype)
    )

    if c.place_embedding:
      frames = positions[None] + (0 if start is None else start[:, None])
      tokens = tokens + _dense(c, c.dim, "place_embedding")(
        place_features(frames, rows, columns, c.places)
      )

    text = nn.gelu(_dense(c, c.dim, "text_embedding_in")(text.astype(c.dtype)), approximate=True)
    text = _dense(c, c.dim, "text_embedding_out")(text)
    # float32: bfloat16 has steps of 4 at timesteps between 512 and 1024
    dense_f32 = functools.partial(
      nn.Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=jnp.float32
    )
    time = dense_f32(c.dim, name="time_embedding_in")(time_features(timestep, c.freq_dim))
    time = dense_f32(c.dim, name="time_embedding_out")(nn.silu(time))
    modulation = dense_f32(6 * c.dim, name="time_projection")(nn.silu(time))
    modulation = modulation.reshape(b, f, 6, c.dim)

    cos, sin = rope.rotation(positions, rows, columns, c.head_dim)
    tokens, own = _layers(c)(tokens, past, Shared(modulation, text, cos, sin, mask))

    # the head takes the time embedding itself, not its projection
    head = self.param("head_modulation", nn.initializers.normal(c.dim**-0.5), (1, 2, c.dim))
    shift, scale = _modulators(time[:, :, None] + head[:, None])
    tokens = (layer_norm(tokens, c.eps) * (1 + scale) + shift).astype(c.dtype)
    # zeros, as Wan2.1: a fresh network predicts velocity 0
    tokens = _dense(c, ph * pw * c.channels, "head", kernel_init=nn.initializers.zeros)(tokens)
    # the inverse of the patches above
    velocity = tokens.reshape(b, f, rows, columns, ph, pw, c.channels).transpose(
      0, 1, 2, 4, 3, 5, 6
    )
    return velocity.reshape(b, f, h, w, c.channels).astype(jnp.float32), own


def init(config: DiTConfig, key: jax.Array) -> Params:
  """Returns random parameters (float32); under jax.eval_shape their shapes alone."""
  _, ph, pw = config.patch
  x = jnp.zeros((1, 1, ph, pw, config.channels))  # one patch: parameters do not depend on sizes
  variables = DiT(config).init(
    key, x, jnp.zeros((1, 1)), jnp.zeros((1, 1, config.text_dim)), jnp.zeros(1, jnp.int32)
  )
  return variables["params"]
