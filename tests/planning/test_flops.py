"""Operations of traced programs against those counted by hand, and a network's own estimate."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hiar_jax.models import dit
from hiar_jax.models.frames import bind, whole_clip
from hiar_jax.planning import flops

X, Y = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7
ONE = 2 * 4**3  # a product of two squares


def test_products():
  assert flops.count(lambda x, y: jnp.sin(x) @ y + 1, X, Y) == PRODUCT
  batched = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
  assert flops.count(lambda x, y: x @ y, batched, Y) == 2 * PRODUCT
  image, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 6, 6, 2), (3, 3, 2, 5))
  )
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  assert flops.count(convolve, image, kernel) == 2 * (4 * 4 * 5) * (3 * 3 * 2)


def test_what_no_result_needs_is_not_counted():
  def unused(x, y):
    x @ y
    return x + 1

  assert flops.count(unused, X, Y) == 0


def test_loops_are_multiplied_out():
  def scanned(x):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=6)[0]

  assert flops.count(scanned, SQUARE) == 6 * ONE
  assert flops.count(jax.jit(scanned), SQUARE) == 6 * ONE  # of a call too
  nested = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: scanned(x), x)
  assert flops.count(nested, SQUARE) == 18 * ONE


def test_a_loop_of_unknown_length_turns_as_often_as_is_said():
  def until(x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x) @ x

  n = jax.ShapeDtypeStruct((), jnp.int32)
  assert flops.count(until, SQUARE, n, turns=1.5) == 2.5 * ONE
  assert flops.count(until, SQUARE, n) == 2 * ONE


def test_gradients():
  """Of a product both operands have one; of what is computed again, once more."""

  def loss(x):
    return jnp.sum(jnp.sin(x @ x) @ x)

  assert flops.count(jax.grad(loss), SQUARE) == 5 * ONE  # 1 + 4: the value itself is not asked for
  again = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x))
  assert flops.count(jax.grad(lambda x: jnp.sum(again(x))), SQUARE) == 6 * ONE


def test_a_gradient_of_its_own_is_counted_as_it_is():
  @jax.custom_vjp
  def product(x, y):
    return x @ y

  product.defvjp(
    lambda x, y: (x @ y, (x, y)), lambda kept, g: (g @ kept[1].T, jnp.zeros_like(kept[1]))
  )
  grad = jax.grad(lambda x, y: jnp.sum(jnp.sin(product(x, y))), argnums=(0, 1))
  assert flops.count(product, X, Y) == PRODUCT
  assert flops.count(grad, X, Y) == 2 * PRODUCT


def test_of_branches_the_larger_counts():
  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops.count(either, SQUARE) == 2 * ONE


def test_a_kernel_is_no_number():
  from jax.experimental import pallas

  def kernel(x, out):
    out[...] = x[...] @ x[...]

  call = pallas.pallas_call(kernel, out_shape=SQUARE, interpret=True)
  with pytest.raises(ValueError, match="a kernel cannot be counted"):
    flops.count(call, SQUARE)


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_a_network_counts_itself_alike(attention):
  network = dit.DiTConfig(
    dim=64,
    ffn_dim=160,
    num_heads=4,
    num_layers=3,
    channels=4,
    text_dim=24,
    freq_dim=32,
    attention=attention,
    dtype="float32",
  )
  params = jax.eval_shape(network.init, jax.random.key(0))
  x, text = jnp.zeros((1, 3, 8, 12, 4)), jnp.zeros((1, 8, 24))

  def forward(params):
    return bind(network, params, text)(whole_clip(x, jnp.ones(()))).velocity

  stated = network.flops(3, 3, network.tokens(8, 12), 8)
  assert flops.count(forward, params) == pytest.approx(stated, rel=1e-12)
