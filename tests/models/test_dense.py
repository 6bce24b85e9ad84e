"""The layer's product: Flax's in float32, and with float32 sums in its gradients in 16 bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models.dense import Dense
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

ROWS, WIDE, OUT = 4096, 3, 2
X, W = tiny.random(1, 2, ROWS // 2, WIDE) + 1, tiny.random(2, 2, ROWS // 2, OUT) + 1


def gradients(module, dtype):
  """Of sum(y w) in parameters and input."""
  x, w = jnp.asarray(X, dtype), jnp.asarray(W, dtype)
  params = module.init(jax.random.key(0), x)
  loss = lambda params, x: (module.apply(params, x) * w).astype(jnp.float32).sum()
  return quick_jit(jax.grad(loss, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("merged", [False, True])
def test_float32_is_flax(merged):
  ours = Dense(OUT, "float32", merged)
  theirs = nn.Dense(OUT, kernel_init=nn.initializers.xavier_uniform())
  params = ours.init(jax.random.key(0), X)
  jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0), X))
  np.testing.assert_allclose(ours.apply(params, X), theirs.apply(params, X), rtol=1e-6)
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(near, gradients(ours, "float32"), gradients(theirs, "float32"))


@pytest.mark.parametrize("merged", [False, True])
def test_gradients_of_16_bits_are_summed_in_float32(merged):
  """4,096 numbers around 1: a sum in bfloat16 is off by up to 1 in 256."""
  (found, dx), ours = gradients(Dense(OUT, "bfloat16", merged), "bfloat16"), "params"
  x, w = (np.asarray(jnp.asarray(part, "bfloat16"), np.float64) for part in (X, W))
  kernel = np.einsum("bni,bno->io", x, w)
  assert found[ours]["kernel"].dtype == jnp.float32 and dx.dtype == jnp.bfloat16
  np.testing.assert_allclose(found[ours]["kernel"], kernel, rtol=1e-6)
  np.testing.assert_allclose(found[ours]["bias"], w.sum((0, 1)), rtol=1e-6)


def test_no_gradient_is_a_16_bit_sum():
  """What devices add up is what the product gives: float32 in the program too."""
  x = jnp.zeros((2, 8, WIDE), jnp.bfloat16)
  module = Dense(OUT, "bfloat16")
  params = module.init(jax.random.key(0), x)
  text = str(
    jax.make_jaxpr(jax.grad(lambda p: module.apply(p, x).astype(jnp.float32).sum()))(params)
  )
  assert f"f32[{WIDE},{OUT}] = dot_general" in text
  flax = nn.Dense(OUT, dtype=jnp.bfloat16)
  text = str(jax.make_jaxpr(jax.grad(lambda p: flax.apply(p, x).astype(jnp.float32).sum()))(params))
  assert f"f32[{WIDE},{OUT}] = dot_general" not in text


def test_tokens_on_several_devices_are_not_merged():
  module = Dense(OUT, "float32", merged=True)
  params = module.init(jax.random.key(0), X)
  rows = lambda: str(jax.make_jaxpr(module.apply)(params, X))
  assert f"f32[{ROWS},{OUT}]" in rows()
  mesh = jax.sharding.AbstractMesh((2,), ("sequence",))
  with jax.sharding.use_abstract_mesh(mesh):
    assert f"f32[{ROWS},{OUT}]" not in rows()
