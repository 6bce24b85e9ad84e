"""The layers of the diffusion transformer (models.dit), and the features that go in.

`config` is a models.dit.DiTConfig everywhere.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import flow
from hiar_jax.attention.attend import attend, attend_text
from hiar_jax.attention.remat import POLICIES
from hiar_jax.attention.views import Views
from hiar_jax.models import rope
from hiar_jax.models.dense import Dense
from hiar_jax.parallel.rules import Rules, constrained

GUIDANCE = ("guidance_in", "guidance_out")  # the layers that embed a guidance scale
PLACE_PERIODS = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # in tokens, for the frame in frames

# Weights [layers ...]; the layers are scanned. As in Megatron-LM (arXiv:1909.08053, section 3): the
# projections into attention and MLP are split by their outputs (columns), those out of them by
# their inputs (rows), so that a layer needs one all-reduce after each. The bias of a module that is
# split by rows is added once, hence not split.
SHARDING_RULES: Rules = (
  ("layers/*/[qkv]/kernel", (None, None, "tensor")),
  ("layers/*/[qkv]/bias", (None, "tensor")),
  ("layers/*/norm_[qk]/scale", (None, "tensor")),
  ("layers/*/o/kernel", (None, "tensor")),
  ("layers/mlp_in/kernel", (None, None, "tensor")),
  ("layers/mlp_in/bias", (None, "tensor")),
  ("layers/mlp_out/kernel", (None, "tensor")),
  # K/V of every level [s layers b slots t a d]: attention splits heads over `sequence` too, so that
  # a cache never moves
  ("past/kv/*", ("level", None, None, None, None, ("tensor", "sequence"))),
)


def time_features(timestep: jax.Array, width: int) -> jax.Array:
  """Returns sinusoids [..., width] of a timestep in [0, 1000], cosines first, as Wan2.1."""
  half = width // 2
  frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
  timestep = timestep[..., None].astype(jnp.float32)
  angles = timestep * along_last_axis(frequencies, timestep)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def place_features(
  frames: jax.Array, rows: int, columns: int, places: tuple[int, int]
) -> jax.Array:
  """Returns sinusoids of a token's frame, row and column.

  frames: [b f] indices; places: see DiTConfig. Returns [b f rows*columns 6*len(PLACE_PERIODS)].
  """

  def waves(count: int) -> jax.Array:  # [count 2*len(PLACE_PERIODS)]
    angles = 2 * np.pi * np.arange(count)[:, None] / np.asarray(PLACE_PERIODS)
    return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1), jnp.float32)

  # the first n frames have rows of their own in the table; later ones share `period` rows
  first, period = places
  time = waves(first + period)[jnp.where(frames < first, frames, first + (frames - first) % period)]
  parts = time[:, :, None, None], waves(rows)[None, None, :, None], waves(columns)[None, None, None]
  shape = (*frames.shape, rows, columns, 2 * len(PLACE_PERIODS))
  return jnp.concatenate([jnp.broadcast_to(part, shape) for part in parts], axis=-1).reshape(
    *frames.shape, rows * columns, -1
  )


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Normalises the last axis without scale or bias; computes and returns float32."""
  x = x.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
  """RMS norm over the whole model width, before heads are split, as Wan2.1 does for q and k."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + self.eps)
    return (normed * along_last_axis(scale, x)).astype(x.dtype)


def along_last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Gives a vector explicit leading axes, so that it broadcasts over the last axis of `like`."""
  return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


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
  """The inputs that all layers share.

  lengths: of packed frames, the tokens of each group: all groups lie in one sequence, f = 1 frame
  of t = their sum, and `modulation` has a row a group; `views` are then of tokens, and the past one
  frame too. deaf: tokens in front that hear no text.
  """

  modulation: jax.Array  # [b f 6 dim]
  text: jax.Array  # [b l dim] or [b g l dim]
  cos: jax.Array  # [f t 1 pairs], or [b f t 1 pairs]
  sin: jax.Array  # as cos
  views: Views = ()  # of frames, or of packed frames' tokens; over [past | own]
  lengths: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  deaf: int = flax.struct.field(pytree_node=False, default=0)


def dense(config: Any, features: int, name: str | None = None, **kwargs) -> Dense:
  return Dense(features, config.dtype, config.merge_tokens, name=name, **kwargs)


class Attention(nn.Module):
  """Projections around attention: self-attention over frames, or cross-attention to text."""

  config: Any

  def setup(self):
    c = self.config
    self.q, self.k, self.v, self.o = (dense(c, c.dim) for _ in range(4))
    self.norm_q, self.norm_k = RMSNorm(c.eps), RMSNorm(c.eps)

  def heads(self, x):  # [... dim] -> [... a d]
    return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

  def to_frames(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    """Attends x [b f t dim] to [past | x]; returns x's shape and x's K/V, each [b f t a d]."""
    # pinned: else XLA gathers x, all tokens of it, for a part of the heads
    q, k, v = (constrained(part(x), "activations/features") for part in (self.q, self.k, self.v))
    q, k, v = (self.heads(part) for part in (self.norm_q(q), self.norm_k(k), v))
    # keys are cached as rotated here, at their true positions; only a relative sink is moved on
    q, k = rope.apply(q, shared.cos, shared.sin), rope.apply(k, shared.cos, shared.sin)
    # in attention devices split heads, between attentions the tokens of a frame
    q, k, v = (constrained(part, "activations/heads") for part in (q, k, v))
    own = KV(k, v)
    if past is not None:  # past first, as in the views
      axis = 2 if shared.lengths else 1  # of tokens, or of frames
      k, v = (
        jnp.concatenate([old.astype(new.dtype), new], axis=axis)
        for old, new in ((past.k, k), (past.v, v))
      )
    if shared.lengths:  # cells are tokens: [b 1 t a d] -> [b t 1 a d]
      q, k, v = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
    y = constrained(attend(q, k, v, shared.views, self.config.attention), "activations/heads")
    return self.o(constrained(y.reshape(x.shape), "activations/features")), own

  def to_text(self, x, text) -> jax.Array:
    """Attends x [b f t dim] to text [b l dim] or [b g l dim]; returns x's shape."""
    q = self.heads(self.norm_q(constrained(self.q(x), "activations/features")))
    k = self.heads(self.norm_k(self.k(text)))
    v = self.heads(self.v(text))
    y = constrained(attend_text(q, k, v, self.config.attention), "activations/heads")
    return self.o(constrained(y.reshape(x.shape), "activations/features"))


class Layer(nn.Module):
  """Self-attention, cross-attention and MLP; the noise level modulates and gates first and last."""

  config: Any

  @nn.compact
  def __call__(self, x, past: KV | None, shared: Shared) -> tuple[jax.Array, KV]:
    c = self.config
    # a learned offset per layer to the modulation of the noise level: [1 1 6 dim] + [b f 6 dim]
    modulation = self.param("modulation", _modulation_init, (1, 6, c.dim))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulators(
      shared.modulation + modulation[:, None], shared.lengths
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
    heard = Attention(c, name="text_attention").to_text(y[:, :, shared.deaf :], shared.text)
    x = x + jnp.pad(heard, ((0, 0), (0, 0), (shared.deaf, 0), (0, 0))) if shared.deaf else x + heard

    y = (layer_norm(x, c.eps) * (1 + scale_m) + shift_m).astype(c.dtype)
    y = dense(c, c.dim, "mlp_out")(nn.gelu(dense(c, c.ffn_dim, "mlp_in")(y), approximate=True))
    # the carry of the scan over layers: pinned here, everything in a layer stays with its examples
    x = constrained((x + y * gate_m).astype(c.dtype), "activations/tokens")
    return x, own


def _modulation_init(key, shape):
  """Draws Wan2.1's normal init plus 1 on the gates: closed gates cost the first 1,000 updates."""
  # rows: shift, scale, gate of self-attention; shift, scale, gate of the MLP
  gates = jnp.asarray([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).reshape(1, 6, 1)
  return gates + jax.random.normal(key, shape) * shape[-1] ** -0.5


def modulators(table: jax.Array, lengths: tuple[int, ...] = ()) -> list[jax.Array]:
  """Splits [b f m dim] into m float32 arrays [b f 1 dim] that broadcast over a frame's tokens.

  lengths: tokens of each of f groups in one sequence; then each array is [b 1 sum(lengths) dim].
  """
  parts = jnp.split(table.astype(jnp.float32), table.shape[-2], axis=-2)
  if not lengths:
    return parts

  def spread(part: jax.Array) -> jax.Array:
    # slices and broadcasts; as one gather XLA's GPU compiler folds an index for every token
    rows = [
      jnp.broadcast_to(part[:, i : i + 1], (part.shape[0], 1, n, part.shape[-1]))
      for i, n in enumerate(lengths)
    ]
    return jnp.concatenate(rows, axis=2)

  return [spread(part) for part in parts]


def stacked(config: Any):
  """Returns all layers as one scanned module: parameters and K/V get a leading layer axis."""
  layer = Layer
  if config.remat != "none":
    # prevent_cse is for code outside of scans; inside, it only costs
    layer = nn.remat(Layer, policy=POLICIES[config.remat], prevent_cse=False)
  # carry: x; scanned over: the parameters and `past`; `shared` is the same for every layer.
  # intermediates: what each layer gives, for callers that capture it
  return nn.scan(
    layer,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
    out_axes=0,
    length=config.num_layers,
    unroll=config.unroll,
  )(config, name="layers")


# Parts of a network's compact `__call__`: the modules that they make are its own.


def embed_text(c: Any, text: jax.Array) -> jax.Array:
  """[... l text_dim] -> [... l dim]"""
  text = nn.gelu(dense(c, c.dim, "text_embedding_in")(text.astype(c.dtype)), approximate=True)
  return of_examples(dense(c, c.dim, "text_embedding_out")(text))


def of_examples(x: jax.Array) -> jax.Array:
  """Returns x [b ...] pinned to the devices of its examples (parallel.rules)."""
  return constrained(x, "activations/examples")


def embed_time(
  c: Any, timestep: jax.Array, guidance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """[b f], and guidance scales [b] -> the time embedding [b f dim], the modulation [b f 6 dim],
  float32
  """
  # float32: bfloat16 has steps of 4 at timesteps between 512 and 1024
  dense_f32 = functools.partial(
    nn.Dense,
    kernel_init=nn.initializers.xavier_uniform(),
    dtype=jnp.float32,
    # by default a TPU rounds float32 factors to bfloat16, and a GPU to TF32
    precision=jax.lax.Precision.HIGHEST,
  )
  time = dense_f32(c.dim, name="time_embedding_in")(time_features(timestep, c.freq_dim))
  time = of_examples(dense_f32(c.dim, name="time_embedding_out")(of_examples(nn.silu(time))))
  if guidance is not None:
    # as HunyuanVideo and FramePack: 1000 times the scale is embedded like a timestep, and added
    features = time_features(flow.TIMESTEPS * guidance[:, None], c.freq_dim)
    hidden = nn.silu(dense_f32(c.dim, name=GUIDANCE[0])(features))
    time = time + dense_f32(c.dim, name=GUIDANCE[1])(hidden)
  modulation = of_examples(dense_f32(6 * c.dim, name="time_projection")(nn.silu(time)))
  return time, modulation.reshape(*timestep.shape, 6, c.dim)


def project_out(
  module: nn.Module, c: Any, tokens: jax.Array, time: jax.Array, lengths: tuple[int, ...] = ()
) -> jax.Array:
  """[b f t dim], [b f dim] -> the numbers of each patch [b f t ph*pw*channels]; lengths: see
  `modulators`
  """
  # the head takes the time embedding itself, not its projection
  head = module.param("head_modulation", nn.initializers.normal(c.dim**-0.5), (1, 2, c.dim))
  shift, scale = modulators(time[:, :, None] + head[:, None], lengths)
  tokens = (layer_norm(tokens, c.eps) * (1 + scale) + shift).astype(c.dtype)
  # zeros, as Wan2.1: a fresh network predicts velocity 0
  _, ph, pw = c.patch
  return dense(c, ph * pw * c.channels, "head", kernel_init=nn.initializers.zeros)(tokens)
