"""Scaled dot-product attention over frames of tokens, masked frame by frame.

Masks are [query frames, key frames]: every method here decides by frame who sees whom, so the token mask is never stored where it can be
avoided. Softmax is float32.
"""

import jax
import jax.numpy as jnp

from hiar_jax.types import FrameMask

IMPLEMENTATIONS = ("xla", "chunked", "cudnn")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: FrameMask | None, implementation: str = "xla") -> jax.Array:
  """q [b f t a d], k and v [b p t a d], mask [f p] -> [b f t a d].

  `xla` forms all logits; `chunked` one query frame at a time and recomputes them in the backward pass (memory linear in f);
  `cudnn` is jax.nn's fused kernel (GPU, 16-bit).
  """
  b, f, t, a, d = q.shape
  keys, values = (x.reshape(b, -1, a, d) for x in (k, v))
  if implementation == "chunked":
    return _chunked(q, keys, values, mask, tokens=t)
  token_mask = None if mask is None else jnp.repeat(jnp.repeat(mask, t, axis=0), t, axis=1)[None, None]
  out = jax.nn.dot_product_attention(
    q.reshape(b, f * t, a, d), keys, values, mask=token_mask, implementation=implementation
  )
  return out.reshape(b, f, t, a, d)


def _chunked(q: jax.Array, keys: jax.Array, values: jax.Array, mask: FrameMask | None, tokens: int) -> jax.Array:
  """One query frame after another; each sees all keys through its row of the mask."""

  @jax.checkpoint
  def one_frame(inputs):
    q_frame, row = inputs
    token_row = None if row is None else jnp.repeat(row, tokens)[None, None, None]
    return jax.nn.dot_product_attention(q_frame, keys, values, mask=token_row, implementation="xla")

  return jnp.moveaxis(jax.lax.map(one_frame, (jnp.moveaxis(q, 1, 0), mask)), 0, 1)


def attend_text(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """q [b f t a d], k and v [b l a d] -> [b f t a d]; all text slots are seen, padding included, as Wan2.1 was trained.

  k and v [b g l a d]: the frames in g equal groups, each with a text of its own.
  """
  b, f, t, a, d = q.shape
  g = k.shape[1] if k.ndim == 5 else 1
  k, v = (x.reshape(b * g, *x.shape[-3:]) for x in (k, v))
  return jax.nn.dot_product_attention(q.reshape(b * g, f // g * t, a, d), k, v, implementation="xla").reshape(b, f, t, a, d)
