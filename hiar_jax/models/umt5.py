"""The UMT5-XXL text encoder as Wan2.1 uses it (UMT5: arXiv 2304.09151; T5: arXiv 1910.10683).

T5's encoder, with a relative position bias per layer instead of one for all:

    x = embed(ids)
    x += attention(norm(x));   x += (gelu(x g) * x u) d      in every layer
    text = norm(x), zero on padding

Attention logits are not scaled by 1 / sqrt(d), as in T5. Deviations: none in the output. Layers are
one scanned module, and the output on padding is set to zeros here (Wan2.1 cuts it off, then pads).
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from hiar_jax.errors import UserError
from hiar_jax.types import Params, Text, typed

MAX_DISTANCE = 128  # tokens; all longer distances share the last bucket (T5)
EPSILON = 1e-6  # of the RMS norms (T5)

Tokens = Int[Array | np.ndarray, "b l"]


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """Sizes; the defaults are UMT5-XXL's, the text encoder of Wan2.1.

  dtype is that of activations, not of weights.
  """

  vocab: int = 256384
  dim: int = 4096
  dim_attn: int = 4096
  dim_ffn: int = 10240
  num_heads: int = 64
  num_layers: int = 24
  num_buckets: int = 32
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.dim_attn % self.num_heads:
      raise UserError(
        f"UMT5: dim_attn={self.dim_attn} is no multiple of num_heads={self.num_heads}; change one."
      )


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
  """Returns the bucket [q, k] of the distance from each query to each key (T5).

  Half of the buckets are for keys behind the query, half for keys ahead. Distances below
  num_buckets / 4 have buckets of their own; longer ones share them logarithmically up to
  MAX_DISTANCE.
  """
  distance = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = num_buckets // 2
  exact = half // 2
  # float32 and truncation as published
  far = np.log(np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact))
  far = exact + (
    far / np.float32(math.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
  ).astype(np.int64)
  near = np.abs(distance)
  return np.where(near < exact, near, np.minimum(far, half - 1)) + half * (distance > 0)


class RMSNorm(nn.Module):
  """x / rms(x) * scale; the norm in float32 whatever the dtype of x."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    # the rounding to x's dtype before the scale is T5's
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)
    return (x32.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Attention(nn.Module):
  """Self-attention with a learned bias per distance and head, without scaling.

  x: [b l d], mask: [b l], True on tokens.
  """

  config: UMT5Config

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    cfg = self.config
    b, length, _ = x.shape

    def heads(name):
      y = nn.Dense(cfg.dim_attn, use_bias=False, dtype=cfg.dtype, name=name)(x)
      return y.reshape(b, length, cfg.num_heads, cfg.dim_attn // cfg.num_heads)

    table = self.param("distance", nn.initializers.normal(0.02), (cfg.num_buckets, cfg.num_heads))
    bias = table[relative_buckets(length, cfg.num_buckets)].astype(jnp.float32)  # [q k a]
    # float32 sums and softmax: logits are not scaled, so they are large
    logits = jnp.einsum(
      "bqad,bkad->baqk", heads("q"), heads("k"), preferred_element_type=jnp.float32
    )
    logits = logits + bias.transpose(2, 0, 1)[None]
    # the least finite number, as published: a row of padding alone would be NaN with -inf
    logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(cfg.dtype)
    y = jnp.einsum("baqk,bkad->bqad", weights, heads("v")).reshape(b, length, cfg.dim_attn)
    return nn.Dense(cfg.dim, use_bias=False, dtype=cfg.dtype, name="o")(y)


class FeedForward(nn.Module):
  """MLP with a gated GELU (tanh form)."""

  config: UMT5Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    gate, up, down = (
      nn.Dense(dim, use_bias=False, dtype=cfg.dtype, name=name)
      for dim, name in ((cfg.dim_ffn, "gate"), (cfg.dim_ffn, "up"), (cfg.dim, "down"))
    )
    return down(jax.nn.gelu(gate(x), approximate=True) * up(x))


class Layer(nn.Module):
  """One layer, in the form that nn.scan asks for: (x, mask) -> (x, None)."""

  config: UMT5Config

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    x = x + Attention(self.config, name="attention")(RMSNorm(name="norm_attention")(x), mask)
    x = x + FeedForward(self.config, name="ffn")(RMSNorm(name="norm_ffn")(x))
    return x, None


class UMT5Encoder(nn.Module):
  """Token ids [b l] and mask [b l] -> text embeddings [b l d].

  Parameters of the layers are stacked: [num_layers, ...].
  """

  config: UMT5Config

  @nn.compact
  def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    cfg = self.config
    x = nn.Embed(cfg.vocab, cfg.dim, dtype=cfg.dtype, name="embed")(token_ids)
    # one compiled layer for all: parameters are scanned over, the mask is the same for each
    layers = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=cfg.num_layers,
    )
    x, _ = layers(cfg, name="layers")(x, mask)
    x = RMSNorm(name="norm")(x)
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


@typed
def encode_text(params: Params, token_ids: Tokens, mask: Tokens, config: UMT5Config) -> Text:
  """Returns the embeddings [b l d] of token ids [b l]; padding comes out as zeros, as published.

  mask: 1 on tokens, 0 on padding. Every prompt needs at least one token (the tokenizer closes even
  an empty prompt with its end mark).
  """
  return UMT5Encoder(config).apply(
    {"params": params}, jnp.asarray(token_ids), jnp.asarray(mask, bool)
  )


def init(config: UMT5Config, key: jax.Array) -> Params:
  """Returns random parameters (float32)."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return UMT5Encoder(config).init(key, ids, jnp.ones((1, 2), bool))["params"]


def abstract_params(config: UMT5Config) -> Params:
  """Returns shapes and dtypes of the parameters; allocates nothing."""
  return jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
