"""Scaled dot-product attention over frames of tokens, masked frame by frame.

Masks are [query frames, key frames]: all methods here decide visibility by frame, so the token
mask, t^2 times larger, is never stored where it can be avoided. Softmax is float32.
"""

import jax
import jax.numpy as jnp

from hiar_jax.types import FrameMask

IMPLEMENTATIONS = ("xla", "chunked", "cudnn")


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: FrameMask | None, implementation: str = "xla"
) -> jax.Array:
  """Attends q [b f t a d] to k, v [b p t a d] under mask [f p]: [b f t a d]; no mask = all.

  `xla` forms all logits; `chunked` those of one query frame at a time, and recomputes them in the
  backward pass (memory linear in f); `cudnn` is jax.nn's fused kernel (GPU, 16-bit).
  """
  b, f, t, a, d = q.shape
  keys, values = (x.reshape(b, -1, a, d) for x in (k, v))
  if implementation == "chunked":
    return _chunked(q, keys, values, mask, tokens=t)
  # frames -> tokens: every entry becomes a t x t tile
  token_mask = None if mask is None else jnp.repeat(jnp.repeat(mask, t, axis=0), t, axis=1)
  queries = q.reshape(b, f * t, a, d)
  if implementation == "xla":
    out = softmax_attention(queries, keys, values, token_mask)
  else:
    token_mask = None if token_mask is None else token_mask[None, None]  # broadcasts over [b a]
    out = jax.nn.dot_product_attention(
      queries, keys, values, mask=token_mask, implementation=implementation
    )
  return out.reshape(b, f, t, a, d)


def softmax_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
  """Attends q [b n a d] to k, v [b m a d] under mask [n m]: [b n a d].

  Every query must see at least one key. softmax(q k^T / sqrt d) v is divided by its sum after the
  product with v: n d divisions instead of n m, and a shorter backward pass (10 % of a training step
  of the small model on a CPU, against jax.nn.dot_product_attention).
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads in front: batched matrix products
  logits = (
    jnp.einsum("band,bamd->banm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  )
  if mask is not None:
    logits = jnp.where(mask, logits, -jnp.inf)
  # the shift by the maximum cancels in the quotient, so it needs no gradient
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  # the product in v's dtype with float32 sums; the divisor sums the float32 weights
  out = jnp.einsum(
    "banm,bamd->band", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return jnp.swapaxes(out / weights.sum(-1, keepdims=True), 1, 2).astype(q.dtype)


def _chunked(
  q: jax.Array, keys: jax.Array, values: jax.Array, mask: FrameMask | None, tokens: int
) -> jax.Array:
  """Attends one query frame after another, each to all keys through its row of the mask."""

  # checkpoint: without it the backward pass of lax.map would keep every frame's logits
  @jax.checkpoint
  def one_frame(inputs):
    q_frame, row = inputs  # [b t a d], [p]
    return softmax_attention(
      q_frame, keys, values, None if row is None else jnp.repeat(row, tokens)[None]
    )

  return jnp.moveaxis(jax.lax.map(one_frame, (jnp.moveaxis(q, 1, 0), mask)), 0, 1)


def attend_text(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attends q [b f t a d] to a text's k, v [b l a d]: [b f t a d].

  No mask: padding is seen too, as Wan2.1 was trained. k, v [b g l a d] hold a text for each of g
  equal groups of the frames.
  """
  b, f, t, a, d = q.shape
  g = k.shape[1] if k.ndim == 5 else 1
  k, v = (x.reshape(b * g, *x.shape[-3:]) for x in (k, v))
  # groups become batch entries: [b*g f*t/g a d] against [b*g l a d]
  return softmax_attention(q.reshape(b * g, f * t // g, a, d), k, v).reshape(b, f, t, a, d)
