"""Attention with all logits in memory: the shortest program, for small sizes."""

import jax
import jax.numpy as jnp


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
