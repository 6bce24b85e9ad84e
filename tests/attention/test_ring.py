"""Attention of frames whose tokens lie on several devices, against softmax in float64 and against
one device; and what the devices send each other.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.attention import blockwise
from hiar_jax.attention.attend import attend, attend_text
from hiar_jax.attention.remat import POLICIES
from hiar_jax.attention.views import View
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.parallel.rules import leaf_sharding
from hiar_jax.planning import collectives
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few, slow

# batch, query frames, key frames, tokens a frame, heads, width of a head
B, F, P, T, A, D = 2, 3, 5, 12, 2, 4
Q, K, V, WEIGHT = (
  tiny.random(i, B, frames, T, A, D) for i, frames in enumerate((F, P, P, F), start=1)
)
MASK = np.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], bool)
STATIC = (View((0, 1), ((0, 1),)), View((1, 2), ((0, 2), (3, 4))), View((2, 3), ((1, 5),)))
ROWS = (
  View((0, 1), ((0, 2),), np.asarray([True, False])),
  View((1, 2), ((0, 5),), MASK[1]),
  View((2, 3), ((1, 3), (3, 5))),
)
VIEWS = {"all": (), "static": STATIC, "rows": ROWS}
MESHES = {
  "data 2 x ring 4": MeshConfig(data=2, ring=4),
  "ring 2 x tensor 2 x sequence 1": MeshConfig(data=-1, ring=2, tensor=2),
  "ring 4 x sequence 2": MeshConfig(data=1, ring=4, sequence=2),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of which a part of a frame has several."""
  monkeypatch.setattr(blockwise, "BLOCK", 5)


def exactly(q, k, v, weight, visible) -> tuple[np.ndarray, ...]:
  """The output and the gradients of q, k, v, in float64: [b n a d], [b m a d], visible [n m]."""
  shapes = [x.shape for x in (q, q, k, v)]
  q, k, v, weight = (
    np.asarray(x, np.float64).reshape(B, -1, *x.shape[-2:]) for x in (q, k, v, weight)
  )
  scale = q.shape[-1] ** -0.5
  s = np.where(visible, np.einsum("bnad,bmad->banm", q, k) * scale, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum("bnad,bmad->banm", weight, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
  found = (
    np.einsum("banm,bmad->bnad", p, v),
    np.einsum("banm,bmad->bnad", ds, k),
    np.einsum("banm,bnad->bmad", ds, q),
    np.einsum("banm,bnad->bmad", p, weight),
  )
  return tuple(x.reshape(shape) for x, shape in zip(found, shapes, strict=True))


def traced(views):
  """Views whose rows are arguments."""
  return tuple(v.replace(row=None if v.row is None else jnp.asarray(v.row)) for v in views)


def with_gradients(q, k, v, weight, views, implementation="auto"):
  """(output, gradients of q, k, v)"""
  out, pull = jax.vjp(lambda *x: attend(*x, views, implementation), q, k, v)
  return out, *pull(weight)


CASES = [(name, place) for name in VIEWS for place in MESHES]
QUICK = [("rows", place) for place in MESHES] + [("static", "data 2 x ring 4")]


@pytest.mark.parametrize(("name", "place"), few(CASES, *QUICK))
def test_values_and_gradients(name, place):
  views, mask = traced(VIEWS[name]), MASK if VIEWS[name] else np.ones((F, P), bool)
  expected = exactly(Q, K, V, WEIGHT, np.kron(mask, np.ones((T, T), bool)))
  alone = quick_jit(functools.partial(with_gradients, implementation="blockwise"))
  alone = alone(Q, K, V, WEIGHT, views)
  with jax.set_mesh(make_mesh(MESHES[place])):
    found = quick_jit(with_gradients)(Q, K, V, WEIGHT, views)
  for ours, exact, theirs in zip(found, expected, alone, strict=True):
    assert np.abs(exact).max() > 0.1 and not ours.sharding.is_fully_replicated
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_sixteen_bits_have_sums_of_float32():
  """Parts of 16 bits, or gradients on their way, would be wrong by a quarter more than one device
  is.
  """
  low = [jnp.asarray(x, "bfloat16") for x in (Q, K, V, WEIGHT)]
  exact = exactly(*(np.asarray(x, np.float32) for x in low), np.ones((F * T, P * T), bool))

  def errors(implementation):
    found = quick_jit(lambda *x: with_gradients(*x, (), implementation))(*low)
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    return [np.std(np.asarray(x, np.float64) - y) for x, y in zip(found, exact, strict=True)]

  alone = errors("blockwise")
  with jax.set_mesh(make_mesh(MeshConfig(data=1, ring=4), jax.devices()[:4])):
    assert (np.asarray(errors("auto")) <= 1.1 * np.asarray(alone)).all()


# -- what is sent and held: sizes are primes, so that nothing else has the size of queries and keys

RING, FRAMES, KEYS, TOKENS, HEADS, WIDTH = 4, 7, 13, 11, 3, 2
COLLECTIVE = re.compile(rf"[ )]({'|'.join(collectives.KINDS)})(?:-start)?\(")
ARRAY = re.compile(r"\b\w+\[([\d,]+)\]")


def compiled(function, *shapes) -> tuple[str, dict[str, int]]:
  """The text of a program of arrays of these shapes on data 2 x ring 4, and its mesh."""
  mesh = make_mesh(MeshConfig(data=2, ring=RING))
  with jax.set_mesh(mesh):
    inputs = [
      jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=leaf_sharding("activations/heads", mesh, shape=shape)
      )
      for shape in shapes
    ]
    return quick_jit(function).lower(*inputs).compile().as_text(), dict(mesh.shape)


def shapes_of(frames: int) -> tuple[int, ...]:
  return 2, frames, RING * TOKENS, HEADS, WIDTH


@pytest.mark.parametrize(
  ("remat", "with_row"), [("attention", True), *slow(("none", False), ("full", False))]
)
def test_keys_go_round_and_nothing_is_gathered(remat, with_row):
  row = jnp.arange(KEYS) != 2 if with_row else None
  views = (View((0, 3), ((0, KEYS),), row), View((3, FRAMES), ((1, 6), (7, KEYS))))

  def loss(q, k, v):
    return jnp.sum(jnp.sin(attend(jnp.cos(q), jnp.cos(k), jnp.cos(v), views)))

  if remat != "none":
    loss = jax.checkpoint(loss, policy=POLICIES[remat])
  text, mesh = compiled(
    jax.value_and_grad(loss, argnums=(0, 1, 2)), shapes_of(FRAMES), *(shapes_of(KEYS),) * 2
  )
  # the loss itself is a sum of all devices, one number
  assert {*COLLECTIVE.findall(text)} == {"collective-permute", "all-reduce"}
  sizes = [math.prod(map(int, found.split(","))) for found in ARRAY.findall(text)]
  assert KEYS * TOKENS * HEADS * WIDTH in sizes  # of a device
  assert max(sizes) < FRAMES * TOKENS * KEYS * TOKENS

  # what `hiar_jax.plan` counts: K and V once round, and once more with their gradients; a layer
  # that keeps nothing goes round first to know its output
  calls = collectives.read(text, mesh).calls
  assert all(one.size == 4 for one, _ in calls if one.kind == "all-reduce")
  keys = [(one, times) for one, times in calls if one.kind == "collective-permute"]
  assert {one.axes for one, _ in keys} == {("ring",)}
  part = 4 * KEYS * TOKENS * HEADS * WIDTH
  rounds = 2 + 4 + (2 if remat == "full" else 0)
  assert sum(one.moved * times for one, times in keys) == rounds * RING * part


# -- text


@pytest.mark.parametrize("groups", [1, F])
def test_queries_of_a_text_stay(groups):
  k, v = (tiny.random(i, B, groups, 3, A, D) for i in (5, 6))
  if groups == 1:
    k, v = k[:, 0], v[:, 0]

  def run(q, k, v, weight):
    out, pull = jax.vjp(attend_text, q, k, v)
    return out, *pull(weight)

  expected = quick_jit(run)(Q, k, v, WEIGHT)
  for config in MESHES.values():
    with jax.set_mesh(make_mesh(config)):
      for ours, theirs in zip(quick_jit(run)(Q, k, v, WEIGHT), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_a_text_is_not_sent():
  def run(q, weight, words):  # the gradients of the words are sums over the ring
    out, pull = jax.vjp(lambda q: attend_text(q, words, words), q)
    return out, pull(weight)[0]

  shape = shapes_of(FRAMES)
  text, _ = compiled(run, shape, shape, (2, 1, 5, HEADS, WIDTH))
  assert not COLLECTIVE.findall(text)
