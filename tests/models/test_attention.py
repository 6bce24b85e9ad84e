"""Attention over frames against softmax written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import attention
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
each_implementation = pytest.mark.parametrize("implementation", ["xla", "chunked"])


def reference(q, k, v, visible) -> np.ndarray:
  """q [b n a d], k and v [b m a d], visible [n m]."""
  logits = np.einsum("bnad,bmad->banm", *(x.astype(np.float64) for x in (q, k))) / np.sqrt(
    q.shape[-1]
  )
  weights = np.exp(logits) * visible
  return np.einsum(
    "banm,bmad->bnad", weights / weights.sum(-1, keepdims=True), v.astype(np.float64)
  )


@each_implementation
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_frames(implementation, mask):
  out = attention.attend(Q, K, V, None if mask is None else jnp.asarray(mask), implementation)
  visible = np.kron(np.ones((F, P), bool) if mask is None else mask, np.ones((T, T), bool))
  expected = reference(*(x.reshape(B, -1, A, D) for x in (Q, K, V)), visible).reshape(Q.shape)
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_masked_frames_do_not_count_at_all():
  changed = V.copy()
  changed[:, 2] = 1e6
  a, b = (np.asarray(attention.attend(Q, K, values, jnp.asarray(MASK))) for values in (V, changed))
  np.testing.assert_array_equal(a[:, :2], b[:, :2])
  assert (a[:, 2] != b[:, 2]).any()


@pytest.mark.parametrize("masked", [False, True])
def test_chunked_gradients(masked):
  mask, weight = jnp.asarray(MASK) if masked else None, tiny.random(4, *Q.shape)

  def gradients(implementation):
    loss = lambda q, k, v: jnp.sum(attention.attend(q, k, v, mask, implementation) * weight)
    return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(Q, K, V)

  for a, b in zip(gradients("chunked"), gradients("xla"), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_chunked_never_holds_all_logits():
  """All heads' logits of all query frames would be [.., F * T, P * T]."""
  attend = lambda implementation: str(
    jax.make_jaxpr(lambda q, k, v: attention.attend(q, k, v, jnp.asarray(MASK), implementation))(
      Q, K, V
    )
  )
  whole = f"{F * T},{P * T}]"
  assert whole in attend("xla") and whole not in attend("chunked")


def test_text():
  k, v = tiny.random(5, B, 3, A, D), tiny.random(6, B, 3, A, D)
  expected = reference(Q.reshape(B, F * T, A, D), k, v, np.ones((F * T, 3), bool)).reshape(Q.shape)
  np.testing.assert_allclose(attention.attend_text(Q, k, v), expected, rtol=0, atol=2e-6)


def test_gradients_are_those_of_softmax_written_out():
  """Also where logits are far too large for exp."""
  mask, weight = jnp.asarray(np.kron(MASK, np.ones((T, T), bool))), tiny.random(7, B, F * T, A, D)
  flat = tuple(jnp.asarray(x.reshape(B, -1, A, D)) for x in (50 * Q, K, V))

  def plain(q, k, v, mask):
    logits = jnp.einsum("bnad,bmad->banm", q, k) / D**0.5
    return jnp.einsum("banm,bmad->bnad", jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)), v)

  gradients = lambda attend: jax.grad(
    lambda *qkv: jnp.sum(attend(*qkv, mask) * weight), argnums=(0, 1, 2)
  )(*flat)
  for ours, theirs in zip(gradients(attention.softmax_attention), gradients(plain), strict=True):
    assert float(jnp.abs(theirs).max()) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_sixteen_bit_inputs_have_logits_of_float32():
  """Rounded to bfloat16, large logits would be wrong by more than one, and so would be who is
  seen.
  """
  q, k, v = (jnp.asarray(x.reshape(B, -1, A, D), "bfloat16") for x in (50 * Q, K, V))
  out = attention.softmax_attention(q, k, v)
  expected = reference(*(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((F * T, P * T)))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(out, np.float32), expected, rtol=0, atol=2**-7 * np.abs(expected).max()
  )
