"""Attention by blocks of queries and keys, forward and backward, in plain JAX: for any device.

FlashAttention's recurrence (arXiv 2205.14135): over blocks of keys, with l = log sum exp,

    m' = max(m, max_j s_j)    z' = z e^(m - m') + sum_j e^(s_j - m')    o' = o e^(m - m') + ...
    backward: p = e^(s - l),  dv = p^T do,  ds = p (do v^T - sum(do o)),  dq = ds k,  dk = ds^T q

so memory is linear in the sequence. Logits, sums and the gradients' sums over blocks are float32;
products are in the inputs' dtype.

Keys may be a part of all (attention.ring): `forward` gives l too, by which parts are merged, and
`gradients` takes the l of all parts.
"""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from hiar_jax.attention.remat import KEPT

BLOCK = 1024  # queries and keys of a block, at most: 4 MiB of logits a head

HIDDEN = -1e30  # a logit of what is not there; infinity would make the difference of two NaN


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: jax.Array | None = None,
  *,
  block: int = BLOCK,
) -> jax.Array:
  """Attends q [b n a d] to k, v [b m a d]: [b n a d]. seen: [m], at least one True; None = all."""
  n, m = q.shape[1], k.shape[1]
  q, k, v = (blocks(x, block) for x in (q, k, v))
  return joined(_attention(q, k, v, bias_of(seen, m, k)), n)


def blocks(x: jax.Array, most: int) -> jax.Array:
  """[b n a d] -> [blocks b a size d], padded with zeros; of even sizes: 1,040 are twice 520."""
  b, n, a, d = x.shape
  size = -(-n // -(-n // most))
  x = jnp.pad(x, ((0, 0), (0, -n % size), (0, 0), (0, 0)))
  return x.reshape(b, -1, size, a, d).transpose(1, 0, 3, 2, 4)


def joined(x: jax.Array, n: int) -> jax.Array:
  """[blocks b a size d] -> [b n a d], without the padding."""
  x = jnp.moveaxis(x, 0, 1)  # [b blocks a size d]
  b, count, a, size, d = x.shape
  return jnp.swapaxes(x, 2, 3).reshape(b, count * size, a, d)[:, :n]


def bias_of(seen: jax.Array | None, m: int, k: jax.Array) -> jax.Array:
  """Returns what is added to the logits of m keys in blocks k: [blocks size]. seen: as `attend`."""
  bias = jnp.where(jnp.arange(m) < m if seen is None else seen, 0.0, HIDDEN)
  bias = jnp.pad(bias, (0, k.shape[0] * k.shape[3] - m), constant_values=HIDDEN)
  return bias.reshape(k.shape[0], -1)


def _product(left: jax.Array, right: jax.Array, axes: str) -> jax.Array:
  return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)


def _logits(q, k, bias) -> jax.Array:
  """[b a n d], [b a m d], [m] -> [b a n m], float32."""
  return _product(q, k, "band,bamd->banm") * q.shape[-1] ** -0.5 + bias[None, None, None]


@jax.custom_vjp
def _attention(q, k, v, bias):
  return forward(q, k, v, bias, q.dtype)[0]


def forward(q, k, v, bias, dtype) -> tuple[jax.Array, jax.Array]:
  """Returns the output [blocks b a n d] in `dtype` and the log-sum-exp of the logits [blocks b a
  n], float32; q, k, v: in `blocks`, bias: see `bias_of`.
  """

  def one_block(q):
    def step(carry, inputs):
      k, v, bias = inputs
      total, highest, out = carry
      s = _logits(q, k, bias)
      new = jnp.maximum(highest, s.max(-1))
      p, scale = jnp.exp(s - new[..., None]), jnp.exp(highest - new)
      out = out * scale[..., None] + _product(p.astype(v.dtype), v, "banm,bamd->band")
      return (total * scale + p.sum(-1), new, out), None

    rows = q.shape[:-1]
    start = jnp.zeros(rows), jnp.full(rows, HIDDEN), jnp.zeros(q.shape, jnp.float32)
    (total, highest, out), _ = jax.lax.scan(step, start, (k, v, bias))
    return (out / total[..., None]).astype(dtype), highest + jnp.log(total)

  return jax.lax.map(one_block, q)


def _keep(q, k, v, bias):
  # named for policies that keep them: the backward pass then needs no forward pass of its own
  out, log_sum = (checkpoint_name(x, KEPT) for x in forward(q, k, v, bias, q.dtype))
  return out, (q, k, v, bias, out, log_sum)


def _backward(kept, d_out):
  q, k, v, bias, out, log_sum = kept
  dq, dk, dv = gradients(q, k, v, bias, shares_of(out, d_out), log_sum, d_out)
  # what is there is no quantity that is learnt
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(bias)


def shares_of(out: jax.Array, d_out: jax.Array) -> jax.Array:
  """Returns sum(do o) of each query, float32."""
  return (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)


def gradients(q, k, v, bias, shares, log_sum, d_out) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of q, k and v in `blocks`, float32.

  shares (`shares_of`), log_sum [blocks b a n], d_out [blocks b a n d]: of all keys, where k and v
  are a part of them.
  """
  scale = q.shape[-1] ** -0.5

  def one_block(dq, inputs):  # of keys
    k, v, bias = inputs

    def step(carry, inputs):  # of queries
      dk, dv = carry
      q, d_out, shares, log_sum, dq = inputs
      p = jnp.exp(_logits(q, k, bias) - log_sum[..., None])
      dv += _product(p.astype(v.dtype), d_out, "banm,band->bamd")
      ds = p * (_product(d_out, v, "band,bamd->banm") - shares[..., None]) * scale
      ds = ds.astype(k.dtype)
      dk += _product(ds, q, "banm,band->bamd")
      return (dk, dv), dq + _product(ds, k, "banm,bamd->band")

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    found, dq = jax.lax.scan(step, start, (q, d_out, shares, log_sum, dq))
    return dq, found

  dq, (dk, dv) = jax.lax.scan(one_block, jnp.zeros(q.shape, jnp.float32), (k, v, bias))
  return dq, dk, dv


_attention.defvjp(_keep, _backward)
