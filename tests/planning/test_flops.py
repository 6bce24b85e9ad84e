"""Operations of traced programs against those counted by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import needed_flops
from hiar_jax.models import dit
from hiar_jax.models.frames import bind, whole_clip
from hiar_jax.packing import orders
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import parse
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


NETWORK = dit.DiTConfig(
  dim=64, ffn_dim=160, num_heads=4, num_layers=3, channels=4, text_dim=24, freq_dim=32
)
PARAMS = lambda network: jax.eval_shape(network.init, jax.random.key(0))


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_a_forward_of_the_network(attention):
  network = dataclasses.replace(NETWORK, attention=attention)
  x, text = jnp.zeros((1, 3, 8, 12, 4)), jnp.zeros((1, 8, 24))

  def forward(params):
    return bind(network, params, text)(whole_clip(x, jnp.ones(()))).velocity

  by_hand = needed_flops.forward(network, 3, 3, network.tokens(8, 12), 8)
  assert flops.count(forward, PARAMS(network)) == pytest.approx(by_hand, rel=1e-12)


def test_the_published_size():
  """A block at 480x832 that sees 21 frames: 12 TFLOP of products and 28 of attention."""
  assert needed_flops.forward(dit.DiTConfig(), 3, 21, 1560, 512) == pytest.approx(41e12, rel=0.05)
  large = dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
  assert needed_flops.forward(large, 3, 21, 1560, 512) == pytest.approx(240e12, rel=0.05)


# schedule, given frames, (tokens, kernel) of each group of 4 x 6 patches that the last of four
# sections reads
PACKED = {
  "vanilla": ("td_f4k4f2k2f1k1_g2", 0, ((2, 4), (6, 2), (24, 1))),
  "both sides": ("td_f2k2f1k1_g2_x_f1k1", 0, ((6, 2), (24, 1), (24, 1))),
  "compressed": ("tc_f2k2f1k1_g2", 0, ((6, 2), (6, 2), (24, 1))),
  "appended": ("ta_f2k2f1k1_g2", 3, ((6, 2), (6, 2), (24, 1))),
  "a large kernel": ("td_f1k8_g2", 0, ((1, 8),)),
}


@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_a_forward_with_packed_history(name, hears):
  notation, given, packed = PACKED[name]
  schedule, history = parse(notation), History(hears=hears)
  network = NETWORK.packed(schedule.pools)
  last = orders.plan(schedule, orders.vanilla(4), given=given)[-1]
  row = jax.tree.map(lambda part: part[0], tables([last])[0])
  video = np.zeros((1, given + 8, 8, 12, 4), np.float32)
  x = video[:, : schedule.generate]
  groups = groups_of_row(schedule, history, video, row, x, np.float32(0.5), patch=network.patch)
  texts = jax.ShapeDtypeStruct((1, 1, 8, 24), jnp.float32)
  forward = lambda params, texts: network.apply(params, groups, texts).velocity[-1]
  deaf = 0 if hears else sum(tokens for tokens, _ in packed)
  by_hand = needed_flops.packed_forward(network, 2 * 24, packed, 8, deaf)
  assert flops.count(forward, PARAMS(network), texts) == pytest.approx(by_hand, rel=1e-12)
