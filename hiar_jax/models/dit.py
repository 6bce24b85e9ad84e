"""The diffusion transformer of Wan2.1: one module, four uses.

Tokens of the latent frames attend to each other and, by cross-attention, to the text; the noise
level modulates every layer and may differ from frame to frame. What a frame sees is an argument, so
the same parameters serve as

    bidirectional     mask=None
    block-causal      mask=visibility.block_causal_mask, one level per frame
    teacher-forcing   [context | noisy] with visibility.teacher_forcing_mask, or the context's K/V
                      as `past`
    cached            past=a KV cache, mask over [past | own]

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
from hiar_jax.types import FrameMask, Params, Positions, Sigma, Text, Texts, Video, typed

REMATS = ("none", "dots", "full")
PLACE_PERIODS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # tokens, and frames


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Sizes under Wan2.1's names. 1.3B: the defaults; 14B: dim 5120, ffn_dim 13824, num_heads 40,
  num_layers 40.

  remat: what the backward pass recomputes: nothing, all but matrix products (dots), or whole layers
  (full).
  unroll: layers per turn of the loop over layers; more run a little faster and compile slower.
  merge_tokens: dense layers take the tokens of all frames and clips as the rows of one matrix.
    Numerically the same; on a CPU a training step is a seventh shorter (XLA transposes the
    gradients of a product with several leading axes, and here sums up the residual stream once more
    to do so). Not where the tokens of a clip are split over devices: such axes cannot be merged
    without gathering them.
  place_embedding: adds to each token a learned function of its row, column and frame. Wan2.1 has
    none: with rotations alone a token finds out where it is only by way of the borders, which small
    grids and short trainings don't teach.
  places: (n, period) of the frames there: the first n of a video are told apart, those after repeat
    with the period. So a video may go on for ever.
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


@flax.struct.dataclass
class KV:
  """Keys (rotated) and values of frames: each [num_layers b f t a d]."""

  k: jax.Array
  v: jax.Array


@flax.struct.dataclass
class Shared:
  """What all layers read: modulation [b f 6 dim], text [b l dim] or [b g l dim], rotations [f t 1
  pairs], mask [f p+f].
  """

  modulation: jax.Array
  text: jax.Array
  cos: jax.Array
  sin: jax.Array
  mask: jax.Array | None


def time_features(timestep: jax.Array, width: int) -> jax.Array:
  """Sinusoidal features of a timestep in [0, 1000]: [..., width], cosines first, as Wan2.1."""
  half = width // 2
  frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
  timestep = timestep[..., None].astype(jnp.float32)
  angles = timestep * _last(frequencies, timestep)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def place_features(
  frames: jax.Array, rows: int, columns: int, places: tuple[int, int]
) -> jax.Array:
  """Sinusoids of a token's frame, row and column: frames [b f] -> [b f rows*columns
  6*len(PLACE_PERIODS)].
  """
  angles = lambda n: 2 * np.pi * np.arange(n)[:, None] / np.asarray(PLACE_PERIODS)
  waves = lambda n: jnp.asarray(
    np.concatenate([np.cos(angles(n)), np.sin(angles(n))], axis=-1), jnp.float32
  )
  first, period = places
  time = waves(first + period)[jnp.where(frames < first, frames, first + (frames - first) % period)]
  parts = time[:, :, None, None], waves(rows)[None, None, :, None], waves(columns)[None, None, None]
  shape = (*frames.shape, rows, columns, 2 * len(PLACE_PERIODS))
  return jnp.concatenate([jnp.broadcast_to(part, shape) for part in parts], axis=-1).reshape(
    *frames.shape, rows * columns, -1
  )


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Without scale or bias; float32 in and out."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
  """Over the whole model width, before heads are split, as Wan2.1 normalises q and k."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)
    return (normed * _last(scale, x)).astype(x.dtype)


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
  """A vector over the last axis of `like`, with explicit leading axes."""
  return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _dense(config: DiTConfig, features: int, name: str | None = None, **kwargs) -> nn.Dense:
  kwargs.setdefault("kernel_init", nn.initializers.xavier_uniform())
  return nn.Dense(
    features,
    dtype=config.dtype,
    name=name,
    dot_general=_rows_product if config.merge_tokens else None,
    **kwargs,
  )


def _rows_product(x: jax.Array, kernel: jax.Array, dimensions, **kwargs) -> jax.Array:
  """x [... in] @ kernel [in out] with all leading axes made one."""
  del dimensions  # nn.Dense's: last with first
  rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs)
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


class Attention(nn.Module):
  """Projections around attention; self-attention over frames, or cross-attention to text."""

  config: DiTConfig

  def setup(self):
    c = self.config
    self.q, self.k, self.v, self.o = (_dense(c, c.dim) for _ in range(4))
    self.norm_q, self.norm_k = RMSNorm(c.eps), RMSNorm(c.eps)

  def heads(self, x):
    return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

  def to_frames(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    """x [b f t dim] -> the same shape, and the K/V of these frames (one layer's)."""
    q, k, v = (
      self.heads(self.norm_q(self.q(x))),
      self.heads(self.norm_k(self.k(x))),
      self.heads(self.v(x)),
    )
    q, k = rope.apply(q, shared.cos, shared.sin), rope.apply(k, shared.cos, shared.sin)
    own = KV(k, v)
    if past is not None:
      k, v = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in ((past.k, k), (past.v, v))
      )
    return self.o(
      attention.attend(q, k, v, shared.mask, self.config.attention).reshape(x.shape)
    ), own

  def to_text(self, x, text) -> jax.Array:
    """x [b f t dim], text [b l dim] or [b g l dim] -> x's shape."""
    q, k, v = (
      self.heads(self.norm_q(self.q(x))),
      self.heads(self.norm_k(self.k(text))),
      self.heads(self.v(text)),
    )
    return self.o(attention.attend_text(q, k, v).reshape(x.shape))


class Layer(nn.Module):
  """Self-attention, cross-attention, MLP; the first and the last modulated and gated by the noise
  level.
  """

  config: DiTConfig

  @nn.compact
  def __call__(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    c = self.config
    modulation = self.param("modulation", _modulation_init, (1, 6, c.dim))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulators(
      shared.modulation + modulation[:, None]
    )

    y = (layer_norm(x, c.eps) * (1 + scale_a) + shift_a).astype(c.dtype)
    y, own = Attention(c, name="self_attention").to_frames(y, past, shared)
    x = (x + y * gate_a).astype(c.dtype)

    norm_text = self.param("norm_text", _affine_init, c.dim)
    y = (layer_norm(x, c.eps) * _last(norm_text["scale"], x) + _last(norm_text["bias"], x)).astype(
      c.dtype
    )
    x = x + Attention(c, name="text_attention").to_text(y, shared.text)

    y = (layer_norm(x, c.eps) * (1 + scale_m) + shift_m).astype(c.dtype)
    y = _dense(c, c.dim, "mlp_out")(nn.gelu(_dense(c, c.ffn_dim, "mlp_in")(y), approximate=True))
    x = (x + y * gate_m).astype(c.dtype)
    return x, own


def _modulation_init(key, shape):
  """As Wan2.1's, but with open gates: from scratch, closed ones cost the first thousand updates."""
  gates = jnp.asarray([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).reshape(1, 6, 1)
  return gates + jax.random.normal(key, shape) * shape[-1] ** -0.5


def _affine_init(key, width):
  del key
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _modulators(table: jax.Array) -> list[jax.Array]:
  """[b f m dim] -> m arrays [b f 1 dim] that broadcast over a frame's tokens."""
  return [part for part in jnp.split(table.astype(jnp.float32), table.shape[-2], axis=-2)]


def _layers(config: DiTConfig):
  """All layers as one scanned module: parameters and K/V get a leading layer axis."""
  layer = Layer
  if config.remat != "none":
    policy = (
      jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    )
    layer = nn.remat(Layer, policy=policy, prevent_cse=False)
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
  """See the module's docstring."""

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
    """Noisy latents -> velocity [b f h w c] in float32, and the K/V of x's frames.

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
    wide = functools.partial(
      nn.Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=jnp.float32
    )
    time = wide(c.dim, name="time_embedding_in")(time_features(timestep, c.freq_dim))
    time = wide(c.dim, name="time_embedding_out")(nn.silu(time))
    modulation = wide(6 * c.dim, name="time_projection")(nn.silu(time)).reshape(b, f, 6, c.dim)

    cos, sin = rope.rotation(positions, rows, columns, c.head_dim)
    tokens, own = _layers(c)(tokens, past, Shared(modulation, text, cos, sin, mask))

    head = self.param("head_modulation", nn.initializers.normal(c.dim**-0.5), (1, 2, c.dim))
    shift, scale = _modulators(time[:, :, None] + head[:, None])
    tokens = (layer_norm(tokens, c.eps) * (1 + scale) + shift).astype(c.dtype)
    tokens = _dense(c, ph * pw * c.channels, "head", kernel_init=nn.initializers.zeros)(tokens)
    velocity = tokens.reshape(b, f, rows, columns, ph, pw, c.channels).transpose(
      0, 1, 2, 4, 3, 5, 6
    )
    return velocity.reshape(b, f, h, w, c.channels).astype(jnp.float32), own


def init(config: DiTConfig, key: jax.Array) -> Params:
  """Fresh parameters. Trace it with jax.eval_shape for the shapes alone."""
  _, ph, pw = config.patch
  x = jnp.zeros((1, 1, ph, pw, config.channels))
  variables = DiT(config).init(
    key, x, jnp.zeros((1, 1)), jnp.zeros((1, 1, config.text_dim)), jnp.zeros(1, jnp.int32)
  )
  return variables["params"]


def bind(config: DiTConfig, params: Params, text: Text, start: jax.Array | None = None):
  """The network as the rollouts and losses use it. start: [b], where in its video each clip begins,
  default at its beginning.

  forward(x [b f h w c], sigma, positions [f], mask=None, past=None) -> (velocity, KV), sigma a
  scalar, [b] or [b f].
  """

  def forward(x, sigma, positions, mask=None, past=None):
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma = sigma[:, None] if sigma.ndim == 1 else sigma
    levels = jnp.broadcast_to(sigma, x.shape[:2]) if sigma.ndim else jnp.full(x.shape[:2], sigma)
    return DiT(config).apply(
      {"params": params},
      jnp.asarray(x),
      flow.timestep(levels),
      jnp.asarray(text),
      positions,
      mask,
      past,
      start,
    )

  return forward
