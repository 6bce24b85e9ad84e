"""Forms of attention at the sizes of a clip, each against softmax attention in float32.

A case is queries, keys and what they see, frame by frame; a form computes it in its own way. The
needed arithmetic counts what is seen: 4 a d operations for a query and key, 3.5 times that with a
gradient (the backward pass computes the logits anew).
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np

from benchmarks.card.programs import Program, normal
from benchmarks.card.sizes import Sizes
from hiar_jax.models import attention

Form = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
  """mask: [query frames, key frames], True where seen. heads, width: of the queries.

  tokens: of a frame; keys of a text are one frame of its own size. gradient: to all three inputs.
  """

  name: str
  mask: np.ndarray
  tokens: int
  heads: int
  width: int
  gradient: bool = False
  key_tokens: int | None = None
  batch: int = 1

  def fill(self) -> tuple[jax.Array, ...]:
    """Returns q [b f t a d] and k, v [b p t a d], bfloat16; for gradients, weights of q's shape."""
    frames, keys = self.mask.shape
    q = (self.batch, frames, self.tokens, self.heads, self.width)
    k = (self.batch, keys, self.key_tokens or self.tokens, self.heads, self.width)
    arrays = tuple(normal(i, shape, "bfloat16") for i, shape in enumerate((q, k, k)))
    return (*arrays, normal(3, q, "bfloat16")) if self.gradient else arrays

  @property
  def tflop(self) -> float:
    pairs = self.mask.sum() * self.tokens * (self.key_tokens or self.tokens)
    scale = 3.5 if self.gradient else 1.0
    return float(scale * self.batch * pairs * 4 * self.heads * self.width / 1e12)

  def program(self, form: str, function: Form) -> Program:
    """Returns the program of a form: (out,), or (out, gradients of sum(out * w))."""

    def run(q, k, v, *w):
      out, pull = jax.vjp(function, q, k, v)
      return (out, *pull(w[0].astype(out.dtype))) if w else (out,)

    return Program(f"{self.name}/{form}", run, self.fill, tflop=self.tflop)


def by_runs(q, k, v, mask: np.ndarray, attend: Form) -> jax.Array:
  """Attends each run of query frames that see the same to those frames alone, without a mask."""
  outs, first = [], 0
  while first < len(mask):
    end = first + 1
    while end < len(mask) and (mask[end] == mask[first]).all():
      end += 1
    seen = np.flatnonzero(mask[first])
    cuts = np.flatnonzero(np.diff(seen) > 1) + 1  # contiguous runs of keys
    runs = [slice(run[0], run[-1] + 1) for run in np.split(seen, cuts)]
    keys, values = (jnp.concatenate([x[:, run] for run in runs], axis=1) for x in (k, v))
    outs.append(attend(q[:, first:end], keys, values))
    first = end
  return jnp.concatenate(outs, axis=1)


def fused(q, k, v, **kwargs) -> jax.Array:
  """cuDNN's kernel: q [b f t a d], k, v [b p t a d]; no mask."""
  b, f, t, a, d = q.shape
  q, k, v = (x.reshape(b, -1, a, d) for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **kwargs)
  return out.reshape(b, f, t, a, d)


def gathered(q, k, v, row: jax.Array) -> jax.Array:
  """The frames of a row that is known at run time, [b p], are gathered to the front; key lengths.

  The lengths of the queries are written so that they depend on the batch, which vmap asks for.
  """
  order = jnp.argsort(~row, axis=-1)[:, :, None, None, None]
  k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
  lengths = (row.sum(-1) * k.shape[2]).astype(jnp.int32)
  queries = 0 * lengths + q.shape[1] * q.shape[2]
  return fused(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=lengths)


def merged(q, k, v, row: jax.Array, own: int) -> jax.Array:
  """Ring and own frames (the last `own`) apart, merged by their log-sum-exp in float32."""
  parts = []
  for keys, values, seen in (
    (k[:, :-own], v[:, :-own], row[:, :-own]),
    (k[:, -own:], v[:, -own:], row[:, -own:]),
  ):
    order = jnp.argsort(~seen, axis=-1)[:, :, None, None, None]
    b, _, t, a, d = keys.shape
    keys, values = (
      jnp.take_along_axis(x, order, axis=1).reshape(b, -1, a, d) for x in (keys, values)
    )
    out, log_sum = cudnn.dot_product_attention(
      q.reshape(b, -1, a, d),
      keys,
      values,
      q_seqlen=jnp.full(b, q.shape[1] * t, jnp.int32),
      kv_seqlen=(seen.sum(-1) * t).astype(jnp.int32),
      scale=d**-0.5,
      mask_type=cudnn.MaskType.PADDING,
      return_residual=True,
    )
    parts.append((out.astype(jnp.float32), jnp.swapaxes(log_sum, 1, 2)[..., None]))
  (out_0, sum_0), (out_1, sum_1) = parts
  share = jax.nn.sigmoid(sum_0 - sum_1)
  return (share * out_0 + (1 - share) * out_1).reshape(q.shape).astype(q.dtype)


def paged(q, k, v, row: jax.Array) -> jax.Array:
  """cuDNN's paged attention: the table holds the pages of the visible frames first.

  Pages are powers of two (cuDNN 9.19 refuses 1,560), so a frame is several: 195 of 8 tokens.
  """
  b, p, t, a, d = k.shape
  page = t & -t  # the largest power of two in t
  count = t // page
  frames = (
    jnp.argsort(~row, axis=-1).astype(jnp.int32) + p * jnp.arange(b, dtype=jnp.int32)[:, None]
  )
  pages = frames[:, :, None] * count + jnp.arange(count, dtype=jnp.int32)
  table = pages.reshape(b, 1, p * count, 1)
  out = cudnn.paged_attention(
    q.reshape(b, -1, a, d),
    k.reshape(b * p * count, page, a, d),
    v.reshape(b * p * count, page, a, d),
    q_seqlen=jnp.full(b, q.shape[1] * t, jnp.int32),
    kv_seqlen=(row.sum(-1) * t).astype(jnp.int32),
    page_table_k=table,
    page_table_v=table,
    scale=d**-0.5,
    mask_type=cudnn.MaskType.PADDING,
  )
  return (out[0] if isinstance(out, tuple | list) else out).reshape(q.shape)


def package(name: str, mask: np.ndarray) -> Form:
  """Today's attention of the package under a mask."""
  mask = None if mask.all() else mask
  return lambda q, k, v: attention.attend(
    q, k, v, None if mask is None else jnp.asarray(mask), name
  )


def _runtime(mask: np.ndarray, form: Callable) -> Form:
  """A form that gets its row [b p] as data, so that nothing is computed while it is compiled."""

  def call(q, k, v):
    # an addition that the compiler cannot fold: 0 * q is not 0 where q is not finite
    row = jnp.asarray(mask)[None, 0] | jnp.isnan(q[:, :1, 0, 0, 0])
    return form(q, k, v, jnp.broadcast_to(row, (q.shape[0], mask.shape[1])))

  return call


def programs(sizes: Sizes) -> list[Program]:
  """Returns the forms of every case; the exact one stands first in each case."""
  heads = sizes.student["num_heads"]
  width = sizes.student["dim"] // heads
  case = functools.partial(Case, tokens=sizes.tokens, heads=heads, width=width)
  n, k = sizes.frames, sizes.block
  block = np.arange(n) // k
  causal = block[:, None] >= block[None]
  # the exit step: noisy blocks see the contexts of the blocks before them, and themselves
  exit_step = np.concatenate([block[:, None] > block[None, : n - k], block[:, None] == block], 1)
  row = np.arange(n) % 5 != 1  # holes
  row[n - k :] = True
  ring = np.broadcast_to(row, (k, n))
  everything = np.ones((n, n), bool)
  text = np.ones((n, 1), bool)
  cases = [
    (
      case("block", everything[:k]),
      {
        "xla": package("xla", everything[:k]),
        "chunked": package("chunked", everything[:k]),
        "cudnn": fused,
      },
    ),
    (
      case("ring", ring),
      {
        "xla, mask": package("xla", ring),
        "chunked, mask": package("chunked", ring),
        "cudnn, mask": package("cudnn", ring),
        "cudnn, gathered": _runtime(ring, gathered),
        "cudnn, merged": _runtime(ring, functools.partial(merged, own=k)),
        "cudnn, paged": _runtime(ring, paged),
      },
    ),
    (
      # a ring in which nothing is visible: what does the kernel make of length 0?
      case("empty ring", np.broadcast_to(np.arange(n) >= n - k, (k, n))),
      {"cudnn, merged": _runtime(np.arange(n)[None] >= n - k, functools.partial(merged, own=k))},
    ),
    (
      case("ring of four levels", ring, batch=4),
      {
        "chunked, mask": package("chunked", ring),
        "cudnn, mask": package("cudnn", ring),
        "cudnn, gathered": _runtime(ring, gathered),
        "cudnn, gathered under vmap": _runtime(ring, _vmapped(gathered)),
        "cudnn, paged": _runtime(ring, paged),
      },
    ),
    (
      case("text", text, gradient=True, key_tokens=sizes.text[0]),
      {"xla": _text, "cudnn": fused},
    ),
    (
      case("clip", everything),
      {"chunked": package("chunked", everything), "cudnn": fused},
    ),
    (
      case("clip, gradient", everything, gradient=True),
      {"chunked": package("chunked", everything), "cudnn": fused},
    ),
    (
      case("block-causal, gradient", causal, gradient=True),
      {
        "chunked, mask": package("chunked", causal),
        "cudnn, mask": package("cudnn", causal),
        "cudnn, slices": lambda q, k, v: by_runs(q, k, v, causal, fused),
      },
    ),
    (
      case("exit step, gradient", exit_step, gradient=True),
      {
        "chunked, mask": package("chunked", exit_step),
        "cudnn, mask": package("cudnn", exit_step),
        "cudnn, slices": lambda q, k, v: by_runs(q, k, v, exit_step, fused),
      },
    ),
    (
      case("clip of the teacher", everything, heads=sizes.teacher["num_heads"]),
      {"chunked": package("chunked", everything), "cudnn": fused},
    ),
  ]
  return [program for c, forms in cases for program in _of_case(c, forms)]


def _text(q, k, v) -> jax.Array:
  return attention.attend_text(q, k[:, 0], v[:, 0])


def _vmapped(form: Callable) -> Callable:
  """The form with each example of the batch under vmap."""
  call = jax.vmap(lambda q, k, v, row: form(q[None], k[None], v[None], row[None])[0])
  return call


def _of_case(c: Case, forms: dict[str, Form]) -> list[Program]:
  """Returns the exact program of a case and those of its forms, which are compared with it."""
  exact = {}

  def keep(result) -> dict:
    exact["result"] = result
    return {}

  def compare(result) -> dict:
    names = ("value", "q", "k", "v")
    pairs = zip(names, exact.get("result", ()), result, strict=False)
    return {f"{name}_error": float(_distance(want, got)) for name, want, got in pairs}

  if c.key_tokens:
    exactly = _text
  else:
    exactly = lambda q, k, v: attention.attend(q, k, v, jnp.asarray(c.mask), "chunked")

  def float32(q, k, v):
    with jax.default_matmul_precision("highest"):
      return exactly(*(x.astype(jnp.float32) for x in (q, k, v)))

  first = dataclasses.replace(c.program("float32", float32), check=keep, repeats=1, tune=False)
  return [first] + [
    dataclasses.replace(c.program(name, form), check=compare) for name, form in forms.items()
  ]


@jax.jit
def _distance(want: jax.Array, got: jax.Array) -> jax.Array:
  """Returns the rms of the difference over the rms of what is wanted, in float32."""
  want, got = want.astype(jnp.float32), got.astype(jnp.float32)
  return jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2))
