"""Attention of frames whose tokens lie on several devices: keys and values go round, queries stay.

Ring Attention (arXiv 2310.01889). The mesh axis `ring` splits the tokens of every frame over R
devices, queries and keys alike. Views are runs of frames, so each device selects its part of them
by itself. In each of R turns it attends to the part j of K/V in hand, which gives an output o_j and
a log-sum-exp l_j, merges them in float32 and hands K/V on to its neighbour:

    l = log(e^l' + e^l_j)    o = o' e^(l' - l) + o_j e^(l_j - l)

The backward pass sends K/V round once more, with their gradients dk, dv in float32, which are home
after R turns. Each turn adds to them and to dq the part of attention.blockwise's backward pass with
the l and o of all parts:

    p_j = e^(s_j - l),  dv_j += p_j^T do,  ds_j = p_j (do v_j^T - sum(do o)),  dk_j += ds_j^T q

A turn's exchange needs nothing of its arithmetic (but for dk, dv), so that both may run at once. A
device holds one part of K/V, and nothing of queries x keys. Parts are computed by
attention.blockwise.
"""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from hiar_jax.attention import blockwise
from hiar_jax.attention.remat import KEPT
from hiar_jax.attention.views import View, Views
from hiar_jax.parallel.rules import leaf_sharding

AXIS = "ring"


def mesh_of(q: jax.Array) -> AbstractMesh | None:
  """Returns the mesh in use where it splits the tokens of the frames q [b f t a d] over `ring`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get(AXIS, 1) == 1 or AXIS in mesh.manual_axes or q.shape[2] % mesh.shape[AXIS]:
    return None
  return mesh


def attend(q: jax.Array, k: jax.Array, v: jax.Array, views: Views = ()) -> jax.Array:
  """Attends q [b f t a d] to k, v [b p t a d] as attend.attend does, on a mesh that is `mesh_of`
  them.
  """
  return _ring(q, k, v, views or (View((0, q.shape[1]), ((0, k.shape[1]),)),))


def to_text(kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Runs kernel(q [b f t a d], k, v [b g l a d]) -> q's shape on each device's tokens and heads.

  Each device has the words of its examples, so nothing is sent but the sums of their gradients.
  """
  mesh = mesh_of(q)
  queries = leaf_sharding("attention/queries", mesh, shape=q.shape).spec
  words = leaf_sharding("attention/words", mesh, shape=k.shape).spec
  specs = queries, words, words
  mapped = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
  return mapped(q, k, v)


@jax.custom_vjp
def _ring(q, k, v, views):
  return _over_devices(_forward, 2, (q, k, v), views)[0]


def _keep(q, k, v, views):
  parts = _over_devices(_forward, 2, (q, k, v), views)
  # named for policies that keep them: the backward pass then sends K/V round once, not twice
  out, log_sum = (checkpoint_name(x, KEPT) for x in parts)
  return out, (q, k, v, views, out, log_sum)


def _backward(kept, d_out):
  q, k, v, views, out, log_sum = kept
  gradients = _over_devices(_gradients, 3, (q, k, v, out, log_sum, d_out), views)
  return *gradients, None  # what is there is no quantity that is learnt


_ring.defvjp(_keep, _backward)


def _over_devices(run: Callable, results: int, arrays: tuple, views: Views) -> tuple:
  """Returns run(views, *arrays) of each device: arrays and results lie as [b f t a ...]."""
  mesh = jax.sharding.get_abstract_mesh()
  everywhere = leaf_sharding("attention/row", mesh).spec
  split = [leaf_sharding("activations/heads", mesh, shape=x.shape).spec for x in arrays]
  run = functools.partial(run, size=mesh.shape[AXIS])
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(everywhere, *split),
    out_specs=(split[0],) * results,  # batch, tokens and heads of all are split alike
    check_vma=False,
  )(views, *arrays)


def _on(parts: tuple, size: int) -> tuple:
  """Hands parts on to the neighbour."""
  neighbours = [(i, (i + 1) % size) for i in range(size)]
  return tuple(jax.lax.ppermute(part, AXIS, neighbours) for part in parts)


def _blocks(x: jax.Array) -> jax.Array:
  """[b f t a d] -> blocks of tokens (blockwise)."""
  return blockwise.blocks(x.reshape(x.shape[0], -1, *x.shape[3:]), blockwise.BLOCK)


def _joined(x: jax.Array, frames: int, tokens: int) -> jax.Array:
  """The inverse of `_blocks`."""
  x = blockwise.joined(x, frames * tokens)
  return x.reshape(x.shape[0], frames, tokens, *x.shape[2:])


def _frames(view: View, x: jax.Array) -> jax.Array:
  """Returns a view's queries of x [b f ...]."""
  return x[:, slice(*view.queries)]


def _keys(view: View, k: jax.Array, v: jax.Array) -> tuple:
  """Returns k, v and bias of what a view sees of the part in hand, in blocks."""
  tokens = k.shape[2]
  seen = None if view.row is None else jnp.repeat(view.row, tokens)
  k, v = (_blocks(view.of(x)) for x in (k, v))
  return k, v, blockwise.bias_of(seen, view.seen * tokens, k)


def _forward(views: Views, q, k, v, *, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns the output [b f t a d] of a device's tokens and its log-sum-exp [b f t a 1]."""
  queries = [_blocks(_frames(view, q)) for view in views]

  def turn(carry, _):
    k, v, merged = carry
    found = [
      _merged(part, blockwise.forward(q, *_keys(view, k, v), jnp.float32))
      for view, q, part in zip(views, queries, merged, strict=True)
    ]
    return (*_on((k, v), size), found), None

  nothing = [
    (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], blockwise.HIDDEN)) for q in queries
  ]
  (_, _, merged), _ = jax.lax.scan(turn, (k, v, nothing), length=size)
  t = q.shape[2]
  out, sums = [], []
  for view, (part, log_sum) in zip(views, merged, strict=True):
    out.append(_joined(part.astype(q.dtype), _count(view), t))
    sums.append(_joined(log_sum[..., None], _count(view), t))
  return jnp.concatenate(out, axis=1), jnp.concatenate(sums, axis=1)


def _count(view: View) -> int:
  """Returns the number of frames that ask."""
  return view.queries[1] - view.queries[0]


def _merged(left: tuple, right: tuple) -> tuple:
  """Returns (output [... d], log-sum-exp [...]) of two parts of the keys."""
  (out, log_sum), (new, new_sum) = left, right
  total = jnp.logaddexp(log_sum, new_sum)
  shares = jnp.exp(log_sum - total), jnp.exp(new_sum - total)
  return out * shares[0][..., None] + new * shares[1][..., None], total


def _gradients(views: Views, q, k, v, out, log_sum, d_out, *, size: int) -> tuple:
  """Returns the gradients of a device's q, k and v [b f t a d]."""
  asked = []  # of each view what its queries bring along
  for view in views:
    mine, o, sums, do = (_blocks(_frames(view, x)) for x in (q, out, log_sum, d_out))
    asked.append((mine, blockwise.shares_of(o, do), sums[..., 0], do))

  def turn(carry, _):
    k, v, dk, dv, dqs = carry
    sums = []
    for view, (mine, shares, log_sum, do), dq in zip(views, asked, dqs, strict=True):
      more, *found = blockwise.gradients(mine, *_keys(view, k, v), shares, log_sum, do)
      sums.append(dq + more)
      dk, dv = (_added(view, total, part) for total, part in zip((dk, dv), found, strict=True))
    return (*_on((k, v, dk, dv), size), sums), None

  zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
  start = k, v, *zeros, [jnp.zeros(mine.shape, jnp.float32) for mine, *_ in asked]
  (_, _, dk, dv, dqs), _ = jax.lax.scan(turn, start, length=size)
  dq = [_joined(dq, _count(view), q.shape[2]) for view, dq in zip(views, dqs, strict=True)]
  dq = jnp.concatenate(dq, axis=1)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _added(view: View, total: jax.Array, part: jax.Array) -> jax.Array:
  """Returns total [b p t a d] and what a view adds to the keys that it sees, in blocks."""
  part, taken = _joined(part, view.seen, total.shape[2]), 0
  for first, end in view.keys:
    total = total.at[:, first:end].add(part[:, taken : taken + end - first])
    taken += end - first
  return total
