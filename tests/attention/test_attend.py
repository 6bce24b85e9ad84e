"""Attention of frames by every kernel, against softmax written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.attention import attend as kernels
from hiar_jax.attention import blockwise, cudnn, splash
from hiar_jax.attention.attend import attend, attend_text
from hiar_jax.attention.softmax import softmax_attention
from hiar_jax.attention.views import View
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

# batch, query frames, key frames, tokens a frame, heads, width of a head
B, F, P, T, A, D = 2, 3, 5, 2, 2, 4
Q, K, V = (
  tiny.random(1, B, F, T, A, D),
  tiny.random(2, B, P, T, A, D),
  tiny.random(3, B, P, T, A, D),
)
MASK = np.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
STATIC = (
  View((0, 1), ((0, 1),)),
  View((1, 2), ((0, 2), (3, 4))),
  View((2, 3), ((1, 5),)),
)
ROWS = (
  View((0, 1), ((0, 2),), np.asarray([True, False])),
  View((1, 2), ((0, 5),), MASK[1]),
  View((2, 3), ((1, 3), (3, 5))),
)
VIEWS = {"all": (), "static": STATIC, "rows": ROWS}

# kernels as they run here: blocks of 3 so that there are several, and an interpreted one
BLOCKWISE = kernels._flat(functools.partial(blockwise.attend, block=3))


def by_lengths(q, k, v, query_seq_lengths=None, key_value_seq_lengths=None) -> jax.Array:
  """What cuDNN's kernel computes: keys behind a length of each example do not count."""
  b, f, t, a, d = q.shape
  q, k, v = (x.reshape(b, -1, a, d) for x in (q, k, v))
  if key_value_seq_lengths is None:
    return softmax_attention(q, k, v).reshape(b, f, t, a, d)
  assert query_seq_lengths.shape == key_value_seq_lengths.shape == (b,)
  one = lambda q, k, v, n: softmax_attention(
    q[None], k[None], v[None], (jnp.arange(k.shape[0]) < n)[None]
  )[0]
  return jax.vmap(one)(q, k, v, key_value_seq_lengths).reshape(b, f, t, a, d)


@pytest.fixture
def here(monkeypatch):
  """The kernels of other devices, as far as they run on a CPU."""
  monkeypatch.setattr(cudnn, "_fused", by_lengths)
  monkeypatch.setitem(kernels.KERNELS, "blockwise", BLOCKWISE)


def reference(q, k, v, visible) -> np.ndarray:
  """q [b n a d], k and v [b m a d], visible [n m]."""
  logits = np.einsum("bnad,bmad->banm", *(x.astype(np.float64) for x in (q, k))) / np.sqrt(
    q.shape[-1]
  )
  weights = np.exp(logits - logits.max(-1, keepdims=True)) * visible
  return np.einsum(
    "banm,bmad->bnad", weights / weights.sum(-1, keepdims=True), v.astype(np.float64)
  )


def traced(views):
  """Views whose rows are arguments."""
  return tuple(v.replace(row=None if v.row is None else jnp.asarray(v.row)) for v in views)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("implementation", ["xla", "blockwise", "cudnn"])
def test_frames(here, implementation, name):
  run = quick_jit(functools.partial(attend, implementation=implementation))
  out = run(Q, K, V, traced(VIEWS[name]))
  mask = MASK if VIEWS[name] else np.ones((F, P), bool)
  visible = np.kron(mask, np.ones((T, T), bool))
  expected = reference(*(x.reshape(B, -1, A, D) for x in (Q, K, V)), visible).reshape(Q.shape)
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("row", [None, MASK[1]], ids=["all", "row"])
def test_odd_lengths_are_padded_for_cudnn(monkeypatch, row):
  """JAX refuses them in training."""

  def even_alone(q, k, v, **lengths):
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0
    cells = (x[:, :, None] for x in (q, k, v))
    return by_lengths(*cells, **lengths)[:, :, 0]

  monkeypatch.setattr(cudnn, "_kernel", even_alone)
  q, k, v = (tiny.random(i, B, frames, 3, A, D) for i, frames in ((1, 3), (2, 5), (3, 5)))
  seen = np.ones(5, bool) if row is None else row
  found = quick_jit(cudnn.attend)(q, k, v, row)
  visible = np.tile(np.repeat(seen, 3), (9, 1))
  expected = reference(*(x.reshape(B, -1, A, D) for x in (q, k, v)), visible).reshape(q.shape)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
@pytest.mark.parametrize("name", ["static", "rows"])
def test_what_is_not_seen_does_not_count_at_all(here, implementation, name):
  changed = V.copy()
  changed[:, 2] = 1e6
  run = quick_jit(functools.partial(attend, implementation=implementation))
  a, b = (np.asarray(run(Q, K, values, traced(VIEWS[name]))) for values in (V, changed))
  np.testing.assert_array_equal(a[:, :2], b[:, :2])
  assert (a[:, 2] != b[:, 2]).any()


@pytest.mark.parametrize("name", VIEWS)
def test_gradients_by_blocks(here, name):
  views, weight = traced(VIEWS[name]), tiny.random(4, *Q.shape)

  def gradients(implementation):
    loss = lambda q, k, v: jnp.sum(attend(q, k, v, views, implementation) * weight)
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(Q, K, V)

  for a, b in zip(gradients("blockwise"), gradients("xla"), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "cudnn"])
def test_a_row_for_each_level_of_a_map(here, implementation):
  """A stream's tick maps over levels, whose rings are filled differently."""
  rows = jnp.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0]], bool)
  call = lambda q, k, v, row: attend(
    q[None], k[None], v[None], (View((0, F), ((0, P),), row),), implementation
  )[0]
  out = quick_jit(jax.vmap(call))(Q, K, V, rows)
  for i, row in enumerate(np.asarray(rows)):
    visible = np.kron(np.tile(row, (F, 1)), np.ones((T, T), bool))
    flat = (x[i : i + 1].reshape(1, -1, A, D) for x in (Q, K, V))
    np.testing.assert_allclose(
      out[i], reference(*flat, visible).reshape(Q.shape[1:]), rtol=0, atol=2e-6
    )


# -- memory: sizes are primes, so that no other product is one of queries and keys

PRIMES = dict(frames=7, tokens=11, keys=13, heads=2, width=8)


def arrays_of(function, *inputs) -> set[tuple[int, ...]]:
  """The shapes of all arrays in a traced function, loops and kernels included."""
  found = set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      found.update(var.aval.shape for var in equation.outvars if hasattr(var.aval, "shape"))
      for value in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
      ):
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
          walk(getattr(value, "jaxpr", value))

  walk(jax.make_jaxpr(function)(*inputs).jaxpr)
  return found


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "cudnn"])
@pytest.mark.parametrize("with_row", [False, True], ids=["static", "row"])
def test_nothing_of_queries_times_keys_is_held(monkeypatch, implementation, with_row):
  s = PRIMES
  monkeypatch.setattr(cudnn, "_fused", lambda q, k, v, **_: q + v.mean() + k.mean())
  monkeypatch.setitem(kernels.KERNELS, "blockwise", BLOCKWISE)
  q = jnp.zeros((1, s["frames"], s["tokens"], s["heads"], s["width"]))
  k = jnp.zeros((1, s["keys"], s["tokens"], s["heads"], s["width"]))
  row = jnp.ones(s["keys"], bool) if with_row else None
  views = (
    View((0, 3), ((0, s["keys"]),), row),
    View((3, s["frames"]), ((1, 6), (7, s["keys"]))),
  )

  def loss(q, k, v):
    return attend(q, k, v, views, implementation).sum()

  shapes = arrays_of(jax.grad(loss, argnums=(0, 1, 2)), q, k, k)
  queries, keys = ({n * s["tokens"] for n in frames} for frames in ((3, 4, 7), (11, 13)))
  products = [shape for shape in shapes if queries & {*shape} and keys & {*shape}]
  assert bool(products) == (implementation == "xla")


# -- text


def test_text():
  k, v = tiny.random(5, B, 3, A, D), tiny.random(6, B, 3, A, D)
  expected = reference(Q.reshape(B, F * T, A, D), k, v, np.ones((F * T, 3), bool)).reshape(Q.shape)
  np.testing.assert_allclose(quick_jit(attend_text)(Q, k, v), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["blockwise", "cudnn"])
def test_a_text_for_each_group_of_frames(here, implementation):
  k, v = tiny.random(5, B, F, 3, A, D), tiny.random(6, B, F, 3, A, D)
  found = quick_jit(lambda q, k, v: attend_text(q, k, v, implementation))(Q, k, v)
  one = quick_jit(lambda q, k, v: attend_text(q, k, v, "xla"))
  for i in range(F):
    alone = one(Q[:, i : i + 1], k[:, i], v[:, i])
    np.testing.assert_allclose(found[:, i : i + 1], alone, rtol=0, atol=2e-6)


# -- all logits at once


def test_gradients_are_those_of_softmax_written_out():
  """Also where logits are far too large for exp."""
  mask, weight = jnp.asarray(np.kron(MASK, np.ones((T, T), bool))), tiny.random(7, B, F * T, A, D)
  flat = tuple(x.reshape(B, -1, A, D) for x in (50 * Q, K, V))

  def plain(q, k, v, mask):
    logits = jnp.einsum("bnad,bmad->banm", q, k) / D**0.5
    return jnp.einsum("banm,bmad->bnad", jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)), v)

  gradients = lambda attend: jax.device_get(
    quick_jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv, mask) * weight), argnums=(0, 1, 2)))(*flat)
  )
  for ours, theirs in zip(gradients(softmax_attention), gradients(plain), strict=True):
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("attention", [softmax_attention, functools.partial(blockwise.attend)])
def test_sixteen_bit_inputs_have_logits_of_float32(attention):
  """Rounded to bfloat16, large logits would be wrong by more than one, and so would be who is
  seen.
  """
  q, k, v = (x.reshape(B, -1, A, D).astype(jnp.bfloat16) for x in (50 * Q, K, V))
  out = quick_jit(attention)(q, k, v)
  expected = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((F * T, P * T)))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float32), expected, rtol=0, atol=2**-7 * np.abs(expected).max()
  )


def test_gradients_of_blocks_are_summed_in_float32():
  """Of 64 blocks of keys or queries: bfloat16 sums would be wrong by a tenth of the result."""
  n = 256
  q, k, v, w = (tiny.random(i, 1, n, 1, 8).astype(jnp.bfloat16) for i in range(4))
  gradients = lambda attend, *inputs: jax.device_get(
    quick_jit(
      jax.grad(
        lambda q, k, v: (attend(q, k, v) * inputs[3]).astype(jnp.float32).sum(), argnums=(0, 1, 2)
      )
    )(*inputs[:3])
  )
  found = gradients(functools.partial(blockwise.attend, block=4), q, k, v, w)
  exact = gradients(softmax_attention, *(x.astype(np.float32) for x in (q, k, v, w)))
  for ours, theirs in zip(found, exact, strict=True):
    error = np.sqrt(np.mean((np.asarray(ours, np.float32) - theirs) ** 2) / np.mean(theirs**2))
    assert error < 6e-3, error


# -- splash, in Pallas' interpreter


@pytest.mark.parametrize("seen", [None, "holes"])
def test_splash_pads_and_hides(seen):
  n, m, a, d = 130, 261, 2, 128
  q, k, v = tiny.random(1, 2, n, a, d), tiny.random(2, 2, m, a, d), tiny.random(3, 2, m, a, d)
  row = None if seen is None else np.arange(m) % 3 != 1
  run = quick_jit(functools.partial(splash.attend, interpret=True))
  out = run(q, k, v, None if row is None else jnp.asarray(row))
  visible = np.ones((n, m), bool) if row is None else np.tile(row, (n, 1))
  np.testing.assert_allclose(out, reference(q, k, v, visible), rtol=0, atol=1e-5)


def test_splash_gradients():
  n, m, a, d = 5, 133, 1, 128
  q, k, v, w = (tiny.random(i, 1, size, a, d) for i, size in enumerate((n, m, m, n)))
  gradients = lambda attend: quick_jit(
    jax.grad(lambda *x: jnp.sum(attend(*x) * w), argnums=(0, 1, 2))
  )(q, k, v)
  found = gradients(functools.partial(splash.attend, interpret=True))
  for ours, theirs in zip(found, gradients(softmax_attention), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


# -- which kernel


@pytest.mark.parametrize(
  ("platform", "dtype", "width", "small", "kernel"),
  [
    ("cpu", "float32", 128, True, "xla"),
    ("cpu", "bfloat16", 128, False, "blockwise"),
    ("gpu", "bfloat16", 128, True, "xla"),
    ("gpu", "bfloat16", 128, False, "cudnn"),
    ("cuda", "float16", 64, False, "cudnn"),
    ("gpu", "float32", 128, False, "blockwise"),
    ("gpu", "bfloat16", 136, False, "blockwise"),
    ("tpu", "bfloat16", 128, False, "splash"),
    ("tpu", "float32", 128, False, "splash"),
    ("tpu", "bfloat16", 64, False, "blockwise"),
  ],
)
def test_auto(platform, dtype, width, small, kernel):
  assert kernels._chosen(platform, dtype, width, small)[0] == kernel


def test_auto_goes_by_the_size_of_the_logits():
  q = jax.ShapeDtypeStruct((64, 3, 1560, 12, 128), jnp.bfloat16)
  small = jax.ShapeDtypeStruct((64, 3, 16, 4, 8), jnp.float32)
  assert kernels.choose(q, q) == "blockwise" and kernels.choose(small, small) == "xla"


def test_auto_goes_by_the_mesh_that_is_compiled_for():
  """A program for a TPU is traced on a CPU."""
  shape = jax.ShapeDtypeStruct((1, 3, 1560, 12, 128), jnp.bfloat16)
  device = jax.sharding.AbstractMesh((), ()).update(
    abstract_device=jax.sharding.AbstractDevice("TPU v5p", 1, "tpu")
  )
  with jax.sharding.use_abstract_mesh(device):
    assert kernels.choose(shape, shape) == "splash"


@pytest.mark.parametrize(
  ("case", "words"),
  [
    (("cudnn", "cpu", "bfloat16", 128), "is for GPUs, and the devices here are cpu"),
    (("splash", "gpu", "bfloat16", 128), "is for TPUs, and the devices here are gpu"),
    (("cudnn", "gpu", "float32", 128), "takes 16 bits, and the network computes in float32"),
    (("cudnn", "gpu", "bfloat16", 136), "up to 128, and these are 136 wide"),
    (("splash", "tpu", "bfloat16", 64), "multiple of 128, and these are 64 wide"),
    (("blockwise", "tpu", "float32", 7), ""),
  ],
)
def test_what_cannot_run_is_said(case, words):
  reason = kernels.refused(*case)
  assert words in reason and bool(words) == bool(reason)
