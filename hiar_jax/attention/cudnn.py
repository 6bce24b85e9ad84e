"""cuDNN's fused attention on NVIDIA GPUs, never with a mask.

A mask would be an additive bias of queries x keys, read once a head and, with a gradient, written
(half as slow again for a ring, 3.4 to 6 times in training; docs/performance.md). What is seen are
slices of the keys, or, where a row says so when the program runs, keys gathered to the front and a
length.
"""

import jax
import jax.numpy as jnp

from hiar_jax.parallel.rules import constrained


def attend(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array | None = None) -> jax.Array:
  """Attends q [b f t a d] to k, v [b p t a d]: q's shape. row: [p], at least one True; None = all.

  16 bits alone.
  """
  if row is None:
    return _fused(q, k, v)
  order = jnp.argsort(~row)  # stable: those that are there come first, in their order
  k, v = (jnp.take(x, order, axis=1) for x in (k, v))
  # under vmap the kernel wants all lengths batched, so those of the queries hang on the row too
  length = jnp.broadcast_to((row.sum() * k.shape[2]).astype(jnp.int32), q.shape[:1])
  queries = 0 * length + q.shape[1] * q.shape[2]
  return _fused(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=length)


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, **lengths) -> jax.Array:
  shape, n, m = q.shape, q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]
  if (n % 2 or m % 2) and not lengths:  # JAX refuses odd ones where there is a gradient
    queries, keys = (jnp.full(shape[:1], size, jnp.int32) for size in (n, m))
    lengths = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
  # the partitioner takes the kernel apart where all three are split alike, and refuses it elsewhere
  flat = (constrained(_even(x), "attention/tokens") for x in (q, k, v))
  return _kernel(*flat, **lengths)[:, :n].reshape(shape)


def _even(x: jax.Array) -> jax.Array:
  """[b f t a d] -> [b n a d], padded to an even n."""
  x = x.reshape(x.shape[0], -1, *x.shape[3:])
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, **lengths) -> jax.Array:
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)
