"""Forms of attention at the sizes of a clip, each against softmax attention in float32.

A case is queries, keys and what they see, frame by frame; a form computes it in its own way. The
needed arithmetic counts what is seen: 4 a d operations for a query and key, 3.5 times that with a
gradient (the backward pass computes the logits anew).
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.card.programs import Program, normal
from benchmarks.card.sizes import Sizes
from hiar_jax.attention.attend import attend, attend_text
from hiar_jax.attention.views import View, simplified, view

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


def package(name: str, mask: np.ndarray) -> Form:
  """The package's attention: what is seen as runs of frames, known while the program is traced."""
  views = tuple(view((i, i + 1), [row]) for i, row in enumerate(mask))
  views = simplified(views, mask.shape[1])
  return lambda q, k, v: attend(q, k, v, views, name)


def with_row(name: str, mask: np.ndarray) -> Form:
  """The package's attention of frames that all see the same, which is data: one row [p]."""

  def form(q, k, v, row):
    one = (View((0, q.shape[1]), ((0, k.shape[1]),), row),)
    return attend(q, k, v, one, name)

  return _runtime(mask, form)


def under_vmap(name: str, mask: np.ndarray) -> Form:
  """The same with each example of the batch under vmap, as a stream's tick has its levels."""

  def form(q, k, v, row):
    views = lambda row: (View((0, q.shape[1]), ((0, k.shape[1]),), row),)
    rows = jnp.broadcast_to(row, (q.shape[0], row.shape[0]))
    one = lambda q, k, v, row: attend(q[None], k[None], v[None], views(row), name)[0]
    return jax.vmap(one)(q, k, v, rows)

  return _runtime(mask, form)


def masked(mask: np.ndarray) -> Form:
  """cuDNN's kernel under a mask of queries and keys, which the package never makes."""

  def form(q, k, v):
    b, f, t, a, d = q.shape
    tokens = jnp.repeat(jnp.repeat(jnp.asarray(mask), t, axis=0), k.shape[2], axis=1)
    q, k, v = (x.reshape(b, -1, a, d) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=tokens[None, None], implementation="cudnn")
    return out.reshape(b, f, t, a, d)

  return form


def _runtime(mask: np.ndarray, form: Callable) -> Form:
  """A form that gets its row [p] as data, so that nothing is computed while it is compiled."""

  def call(q, k, v):
    # an addition that the compiler cannot fold: 0 * q is not 0 where q is not finite
    return form(q, k, v, jnp.asarray(mask)[0] | jnp.isnan(q[0, 0, 0, 0, 0]))

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
  fused = functools.partial(package, "cudnn")
  blocks = functools.partial(package, "blockwise")
  cases = [
    (
      case("block", everything[:k]),
      {
        "xla": package("xla", everything[:k]),
        "blockwise": blocks(everything[:k]),
        "cudnn": fused(everything[:k]),
      },
    ),
    (
      case("ring", ring),
      {
        "blockwise": with_row("blockwise", ring),
        "cudnn": with_row("cudnn", ring),
        "cudnn, mask": masked(ring),
      },
    ),
    (
      case("ring of four levels", ring, batch=4),
      {
        "blockwise, vmap": under_vmap("blockwise", ring),
        "cudnn, vmap": under_vmap("cudnn", ring),
        "cudnn, mask": masked(ring),
      },
    ),
    (
      case("text", text, gradient=True, key_tokens=sizes.text[0]),
      {"xla": _text("xla"), "blockwise": _text("blockwise"), "cudnn": _text("cudnn")},
    ),
    (
      case("clip", everything),
      {"blockwise": blocks(everything), "cudnn": fused(everything)},
    ),
    (
      case("clip, gradient", everything, gradient=True),
      {"blockwise": blocks(everything), "cudnn": fused(everything)},
    ),
    (
      case("block-causal, gradient", causal, gradient=True),
      {"blockwise": blocks(causal), "cudnn": fused(causal), "cudnn, mask": masked(causal)},
    ),
    (
      case("exit step, gradient", exit_step, gradient=True),
      {
        "blockwise": blocks(exit_step),
        "cudnn": fused(exit_step),
        "cudnn, mask": masked(exit_step),
      },
    ),
    (
      case("clip of the teacher", everything, heads=sizes.teacher["num_heads"]),
      {"blockwise": blocks(everything), "cudnn": fused(everything)},
    ),
  ]
  return [program for c, forms in cases for program in _of_case(c, forms)]


def _text(name: str) -> Form:
  return lambda q, k, v: attend_text(q, k[:, 0], v[:, 0], name)


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

  exactly = _text("blockwise") if c.key_tokens else package("blockwise", c.mask)

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
