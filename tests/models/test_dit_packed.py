"""Packed history on the DiT: projections that begin as pooling, pooled rotations by brute force,
and what the network refuses. Recordings: test_dit_packed_golden.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import dit_packed, rope
from hiar_jax.models.frames import PROJECTION, Frames, Read
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit

PACKED = dataclasses.replace(tiny.CONFIG, packing=(1, 2, 4), place_embedding=True)


@pytest.mark.parametrize("pool", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2)])
def test_an_initial_projection_is_pooling_before_the_patch_embedding(pool, patch):
  """In float64: latents averaged over pool^3, then embedded."""
  with jax.enable_x64(True):
    _, ph, pw = patch
    draw = np.random.default_rng(0)
    embedding = {
      "kernel": draw.normal(size=(ph * pw * 3, 5)),
      "bias": draw.normal(size=5),
    }
    x = draw.normal(size=(2, pool + 1, 2 * pool * ph, pool * pw, 3))
    kernel = pool, pool * ph, pool * pw

    @jax.jit
    def run(embedding, x):
      found = dit_packed.initial_projection(embedding, pool, patch)
      return dit_packed.cut_kernels(x, kernel) @ found["kernel"], rope.pad_to_kernel(x, kernel)

    tokens, x = jax.device_get(run(embedding, x))
    b, f, h, w, c = x.shape
    pooled = x.reshape(b, f // pool, pool, h // pool, pool, w // pool, pool, c).mean((2, 4, 6))
    _, f, h, w, _ = pooled.shape
    patches = pooled.reshape(b, f, h // ph, ph, w // pw, pw, c).transpose(0, 1, 2, 4, 3, 5, 6)
    expected = patches.reshape(b, -1, ph * pw * c) @ embedding["kernel"]
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pooled_rotations_by_brute_force(pool):
  """The mean over each kernel of cosines and of sines, edges counted again where they repeat."""
  positions, rows, columns, head_dim = np.asarray([7, 8, 9, 40, 41]), 3, 5, 16
  run = quick_jit(lambda at: rope.pooled_rotation(at, rows, columns, head_dim, pool))
  cos, sin = jax.device_get(run(positions))
  split = rope.split_pairs(head_dim)
  angles = lambda f, r, c: np.concatenate(
    [at * rope.frequencies(n) for at, n in zip((f, r, c), split, strict=True)]
  )
  last = (len(positions) - 1, rows - 1, columns - 1)
  expected = []
  for f in range(0, len(positions), pool):
    for r in range(0, rows, pool):
      for c in range(0, columns, pool):
        inside = [
          angles(positions[min(f + i, last[0])], min(r + j, last[1]), min(c + k, last[2]))
          for i in range(pool)
          for j in range(pool)
          for k in range(pool)
        ]
        expected.append((np.cos(inside).mean(0), np.sin(inside).mean(0)))
  for found, part in ((cos, 0), (sin, 1)):
    np.testing.assert_allclose(found[0, :, 0], [e[part] for e in expected], rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------ on the shapes' DiT


def section(history: int = 5, width: int = 4) -> tuple[Frames, ...]:
  """Groups of 2 + 2 + 1 frames by k4, k2 and k1 before a noisy section."""
  x = tiny.random(3, tiny.BATCH, history + width, 8, width, tiny.CONFIG.channels)
  ends, made = [0, 2, 4, 5, 5 + width], []
  for first, end, name in zip(ends, ends[1:], (*PACKED_NAMES, PROJECTION), strict=False):
    positions = np.arange(first, end, dtype=np.int32)
    reads = tuple(Read(group=j) for j in range(4) if j != len(made))
    made.append(Frames(x[:, first:end], 0.7, positions, reads, projection=name))
  return tuple(made)


PACKED_NAMES = ("packed_k4", "packed_k2", "packed_k1")


@functools.cache
def packed_params():
  base = tiny.params(dataclasses.replace(PACKED, packing=()))
  return jax.device_get(quick_jit(lambda base: dit_packed.with_projections(PACKED, base))(base))


def test_parameters_are_the_base_s_and_pooled_embeddings():
  params = jax.eval_shape(lambda: PACKED.init(jax.random.key(0)))
  base = jax.eval_shape(lambda: dataclasses.replace(PACKED, packing=()).init(jax.random.key(0)))
  assert set(params) - set(base) == set(PACKED_NAMES)
  made, kept = packed_params(), tiny.params(dataclasses.replace(PACKED, packing=()))
  assert dit_packed.with_projections(PACKED, made) is not made
  for name in kept:
    jax.tree.map(np.testing.assert_array_equal, made[name], kept[name])


def test_the_section_sees_all_of_its_history():
  params, texts = packed_params(), jnp.asarray(tiny.text())[None]
  run = quick_jit(lambda groups: PACKED.apply(params, groups, texts).velocity[-1])
  before = run(section())
  for i in range(3):
    groups = list(section())
    groups[i] = groups[i].replace(x=groups[i].x + 1)
    assert np.abs(run(tuple(groups)) - before).max() > 1e-3


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda g: (*g[:-1], g[-1].replace(projection="packed_k1")), "before the one group"),
    (lambda g: (g[0].replace(projection="packed_k8"), *g[1:]), "kernel k8: .* for k1, k2, k4"),
    (lambda g: (g[0].replace(reads=(Read(past=0),)), *g[1:]), "to no past"),
    (lambda g: (g[0].replace(sigma=np.full((2, 2), 0.5)), *g[1:]), "one noise level a group"),
    (lambda g: (g[0], g[1].replace(text=None), *g[2:]), "stand before those with one"),
  ],
)
def test_what_packed_frames_cannot_do(change, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      lambda: PACKED.apply(packed_params(), change(section()), jnp.asarray(tiny.text())[None])
    )
