"""A product with weights whose gradient is summed in float32, over tokens and over devices.

With 16-bit compute the gradient of a weight would be a 16-bit product, and devices would add up
their parts of it in 16 bits before it is cast back: noise of 1 % for 64 parts. Here the product of
the backward pass accumulates and stays in float32, so its reduction does too (the published code's
reduce_dtype).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Module):
  """x [... in] @ kernel [in out] + bias [out] in `dtype`; parameters and their gradients float32.

  merged: all leading axes of x are one for the product (models.dit.DiTConfig.merge_tokens).
  """

  features: int
  dtype: str
  merged: bool = False
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(self.dtype)
    shape = x.shape
    if self.merged and not _tokens_are_split():
      x = x.reshape(-1, shape[-1])
    affine = _affine if jnp.dtype(self.dtype) == jnp.float32 else _wide
    return affine(x, kernel, bias).reshape(*shape[:-1], self.features)


def _tokens_are_split() -> bool:
  """True where a frame lies on several devices: to merge it with others would be to gather it."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape.get(axis, 1) > 1 for axis in ("sequence", "ring"))


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """x [... in] @ kernel [in out] + bias [out], in x's dtype."""
  y = jax.lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
  return y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


@jax.custom_vjp
def _wide(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """`_affine` of 16 bits, with float32 sums in the gradients of kernel and bias."""
  return _affine(x, kernel, bias)


def _keep(x, kernel, bias):
  return _affine(x, kernel, bias), (x, kernel, bias)


def _backward(kept, dy):
  x, kernel, bias = kept
  rows = tuple(range(x.ndim - 1))
  dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())))
  dk = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  db = dy.astype(jnp.float32).sum(rows)
  return dx, dk.astype(kernel.dtype), db.astype(bias.dtype)


_wide.defvjp(_keep, _backward)
